"""The von Mises-Fisher distribution with fixed concentration: draws, densities and its KL to the uniform one.

Shapes: K samples, R rows, N points, D dimensions, P panels, Q quantiles.

    q(z) = C exp(kappa <mean, z>)   on the unit sphere of R^D, D >= 2, a density over its surface

The angle t between z and the mean has a density proportional to exp(kappa cos t) sin(t)^(D - 2); the direction in which
z leaves the mean is uniform and independent of t. kappa never changes, so the integrals over t are constants and the
quantiles of t a table, both made once in float64 by Gauss-Legendre quadrature: no Bessel function, no rejection, and a
draw is a smooth function of the mean and of D normals.

Source: Davidson et al., "Hyperspherical variational auto-encoders" (2018), section 3; Xu and Durrett,
"Spherical latent spaces for stable variational autoencoders" (2018), section 3. Both draw t by rejection.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# Less than 1e-17 of the angle's density lies so many widths from its peak.
_WIDTHS = 14.0
_PANELS = 512
_NODES = 8
_HALVINGS = 40
# Philox normals stay within 6.67.
_NORMAL_LIMIT = 7.0
# Interpolation between them moves the distribution function by less than 5e-7.
_QUANTILES = 4097

_Density = Callable[[torch.Tensor], torch.Tensor]


class VonMisesFisher:
    """The constants of one (D, kappa), in nats, and what depends on the mean.

    Attributes:
        mean_cosine: E[<mean, z>], A_D(kappa) in the papers.
        kl: KL to the uniform distribution.
        negative_entropy: E[log q(z)].
        log_uniform: log density of the uniform distribution.
    """

    def __init__(self, dim: int, kappa: float) -> None:
        self.dim, self.kappa = dim, kappa
        law = _angle_law(dim, kappa)
        self._log_q_at_mean = -law.log_integral - _log_sphere_area(dim - 1)
        self.mean_cosine = 1.0 - law.mean_gap
        self.log_uniform = -_log_sphere_area(dim)
        self.negative_entropy = self._log_q_at_mean - kappa * law.mean_gap
        self.kl = self.negative_entropy - self.log_uniform

    def draw(self, mean_RD: torch.Tensor, normal_KRD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(z [K, R, D], log q(z) [K, R]), dtype of the mean.

        Args:
            mean_RD: unit vectors; z is differentiable in them. log q depends on the angle alone, hence on the noise
                alone: it has no gradient (the one through z and the one through the mean cancel).
            normal_KRD: standard normal noise, the first for the angle, the others for the direction.
        """
        dtype = mean_RD.dtype
        angle_KR1 = self._angle(normal_KRD[..., :1])
        cosine_KR1, sine_KR1 = angle_KR1.cos().to(dtype), angle_KR1.sin().to(dtype)
        log_q_KR1 = self._log_q_at_mean - self.kappa * _gap(angle_KR1)
        z_KRD = cosine_KR1 * mean_RD + sine_KR1 * _tangent(mean_RD, normal_KRD[..., 1:].to(dtype))
        return z_KRD, log_q_KR1[..., 0].to(dtype)

    def log_density(self, z_ND: torch.Tensor, mean_RD: torch.Tensor) -> torch.Tensor:
        """log q(z_n | mean_r) of unit vectors, float64 [N, R]."""
        return self._log_q_at_mean + self.kappa * (z_ND.double() @ mean_RD.double().T - 1.0)

    def _angle(self, normal: torch.Tensor) -> torch.Tensor:
        """The angle with as much probability below it as the normal has, float64."""
        table_Q = _quantile_table(self.dim, self.kappa, normal.device)
        place = (normal.double() / _NORMAL_LIMIT + 1.0) * ((_QUANTILES - 1) / 2)
        below = place.long().clamp(0, _QUANTILES - 2)
        return torch.lerp(table_Q[below], table_Q[below + 1], place - below)


def _tangent(mean_RD: torch.Tensor, normal_KRd: torch.Tensor) -> torch.Tensor:
    """Uniform unit vectors orthogonal to the mean, [K, R, D], from D - 1 normals.

    A unit vector orthogonal to e1 is reflected by the Householder reflection that takes e1 to the mean or to its
    opposite, whichever is farther from e1: that one is nowhere singular. Where the first coordinate of the mean changes
    sign the vector jumps, but its distribution does not, so a gradient's expectation is right all the same.
    """
    # Philox gives a zero once in 2^25 normals; with D = 2 a zero would have no direction.
    normal_KRd = torch.where(normal_KRd == 0.0, 1e-8, normal_KRd)
    side_KRD = F.pad(normal_KRd / normal_KRd.norm(dim=-1, keepdim=True), (1, 0))
    first_R1 = mean_RD[:, :1]
    sign_R1 = torch.where(first_R1 >= 0.0, 1.0, -1.0).to(mean_RD.dtype)
    mirror_RD = mean_RD + F.pad(sign_R1, (0, mean_RD.shape[1] - 1))
    along_KR1 = (mean_RD * side_KRD).sum(-1, keepdim=True) / (1.0 + sign_R1 * first_R1)
    return side_KRD - along_KR1 * mirror_RD


class _AngleLaw(NamedTuple):
    """What is needed of the density exp(-kappa gap(t)) sin(t)^(D - 2) over its integral, float64.

    Attributes:
        log_integral: log of the integral over [0, pi].
        mean_gap: E[1 - cos t].
        quantile_Q: t at equally spaced normals in [-_NORMAL_LIMIT, _NORMAL_LIMIT].
    """

    log_integral: float
    mean_gap: float
    quantile_Q: torch.Tensor


@functools.lru_cache(maxsize=16)
def _angle_law(dim: int, kappa: float) -> _AngleLaw:
    # Numbers, even where a model is made on the meta device to be counted.
    with torch.device("cpu"):
        return _integrated_angle_law(dim, kappa)


def _integrated_angle_law(dim: int, kappa: float) -> _AngleLaw:
    power, ratio = dim - 2, (dim - 2) / kappa
    mode = math.acos(2.0 / (ratio + math.hypot(ratio, 2.0)))
    width = (kappa * math.cos(mode) + (power / math.sin(mode) ** 2 if power else 0.0)) ** -0.5

    def log_weight(t: torch.Tensor) -> torch.Tensor:
        return torch.special.xlogy(power, t.sin()) - kappa * _gap(t)

    peak = float(log_weight(torch.tensor(mode, dtype=torch.float64)))

    def density(t: torch.Tensor) -> torch.Tensor:
        return torch.exp(log_weight(t) - peak)

    start, end = max(0.0, mode - _WIDTHS * width), min(math.pi, mode + _WIDTHS * width)
    edges = torch.linspace(start, end, _PANELS + 1, dtype=torch.float64)
    mass_P = _integral(density, edges[:-1], edges[1:])
    total = float(mass_P.sum())
    gap = float(_integral(lambda t: _gap(t) * density(t), edges[:-1], edges[1:]).sum())
    return _AngleLaw(math.log(total) + peak, gap / total, _quantiles(density, edges, mass_P))


@functools.lru_cache(maxsize=16)
def _quantile_table(dim: int, kappa: float, device: torch.device) -> torch.Tensor:
    return _angle_law(dim, kappa).quantile_Q.to(device)


def _quantiles(density: _Density, edges: torch.Tensor, mass_P: torch.Tensor) -> torch.Tensor:
    """Where the integral of the density has its `quantile_Q` shares, by bisection within a panel."""
    normal_Q = torch.linspace(-_NORMAL_LIMIT, _NORMAL_LIMIT, _QUANTILES, dtype=torch.float64)
    wanted_Q = torch.special.ndtr(normal_Q) * mass_P.sum()
    upto_P = mass_P.cumsum(0)
    panel_Q = torch.searchsorted(upto_P, wanted_Q).clamp(max=_PANELS - 1)
    rest_Q = wanted_Q - (upto_P - mass_P)[panel_Q]
    start_Q = edges[panel_Q]
    low_Q, high_Q = start_Q, edges[panel_Q + 1]
    for _ in range(_HALVINGS):
        middle_Q = 0.5 * (low_Q + high_Q)
        is_below_Q = _integral(density, start_Q, middle_Q) < rest_Q
        low_Q, high_Q = torch.where(is_below_Q, middle_Q, low_Q), torch.where(is_below_Q, high_Q, middle_Q)
    return 0.5 * (low_Q + high_Q)


def _integral(function: _Density, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Integrals from `start` to `end`, elementwise: Gauss-Legendre."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(_NODES))
    half = 0.5 * (end - start)
    return half * (function(start[:, None] + half[:, None] * (nodes + 1.0)) @ weights)


def _gap(t: torch.Tensor) -> torch.Tensor:
    """1 - cos t, to full precision near 0."""
    return 2.0 * torch.sin(0.5 * t).square()


def _log_sphere_area(dim: int) -> float:
    """log of the surface of the unit sphere of R^dim; two points for dim = 1."""
    return math.log(2.0) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)
