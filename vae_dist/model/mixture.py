"""Mixtures of diagonal Gaussians: densities and draws.

Shapes: R rows, C components, D latent dimensions. Densities are in nats.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Components(NamedTuple):
    """A mixture: sum over c of exp(log_weight_C) N(mean_CD, diag exp(logvar_CD)).

    Attributes:
        log_weight_C: log of weights that sum to one; -inf for a component that is not there.
        mean_CD, logvar_CD: mean and log of the variance.
    """

    log_weight_C: torch.Tensor
    mean_CD: torch.Tensor
    logvar_CD: torch.Tensor


def log_joint(z_RD: torch.Tensor, components: Components) -> torch.Tensor:
    """log weight_c + log N(z_r; c), float64 [R, C], from matrix products: nothing of R x C x D is made.

    In float64 whatever comes in: the square is expanded, and what is left of z^2 / v - 2 z m / v + m^2 / v where
    variances are small or components far would be lost in float32. Autocast leaves float64 alone.
    """
    z_RD, (log_weight_C, mean_CD, logvar_CD) = z_RD.double(), (part.double() for part in components)
    precision_CD = (-logvar_CD).exp()
    constant_C = log_weight_C - 0.5 * (mean_CD.square() * precision_CD + logvar_CD + math.log(2 * math.pi)).sum(-1)
    linear_RC = torch.addmm(constant_C, z_RD, (mean_CD * precision_CD).T)
    return torch.addmm(linear_RC, z_RD.square(), precision_CD.T, alpha=-0.5)


def log_mixture(z_RD: torch.Tensor, components: Components) -> torch.Tensor:
    """log density of the rows, [R], float32 (float64 for float64 rows)."""
    return log_joint(z_RD, components).logsumexp(-1).to(torch.promote_types(z_RD.dtype, torch.float32))


def draw(normal_RD: torch.Tensor, uniform_R: torch.Tensor, components: Components) -> torch.Tensor:
    """Rows of the mixture, [R, D], from noise: the component by the inverse CDF of `uniform_R`, in [0, 1)."""
    cdf_C = components.log_weight_C.double().exp().cumsum(0)
    # Over its own end, so that rounding leaves no number beyond the last component with a weight.
    chosen_R = torch.searchsorted(cdf_C / cdf_C[-1], uniform_R.double(), right=True)
    deviation_RD = (0.5 * components.logvar_CD[chosen_R]).exp()
    return (components.mean_CD[chosen_R] + deviation_RD * normal_RD).to(normal_RD.dtype)
