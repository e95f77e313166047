"""Posteriors q(z | x): what the encoder's output becomes, draws from it, and its densities.

Shapes: K samples, R rows (sequences or tokens), H width of the encoder's output, D latent dimensions.

Each is a linear map of the encoder's output and a law, with the same three members: `forward`, `draw` and
`negative_entropy`. Parameters are used in `forward` only (ZeRO-3 gathers them there). Densities are float32, in a
float64 model float64, whatever autocast says.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from vae_dist.config.model_schema import DeltaConfig, ModelConfig, VmfConfig
from vae_dist.errors import ConfigError
from vae_dist.model.latent import LatentSample
from vae_dist.model.vmf import VonMisesFisher
from vae_dist.model.whole_batch import WholeBatchNorm
from vae_kernels import gaussian_rsample_kl, philox_normal

LogPrior = Callable[[torch.Tensor], torch.Tensor]

_LOG_2PI = math.log(2.0 * math.pi)


class GaussianPosterior(nn.Linear):
    """N(mean, diag exp(logvar)) (Kingma and Welling 2014), its means normalised over the batch if gamma is given."""

    def __init__(self, input_dim: int, latent_dim: int, batch_norm_gamma: float | None = None) -> None:
        super().__init__(input_dim, 2 * latent_dim)
        self.batch_norm = None if batch_norm_gamma is None else WholeBatchNorm(latent_dim, batch_norm_gamma)

    def forward(  # type: ignore[override]
        self, h_RH: torch.Tensor, weight_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, logvar), [R, D] each; `weight_R` is 0 for padding. Collective if normalised, while training."""
        if self.batch_norm is None:
            mean_RD, logvar_RD = _linear(self, h_RH).chunk(2, dim=-1)
            return mean_RD, logvar_RD
        # A bias of the means would be normalised away, and its gradient be rounding for Adam to follow.
        mean_RD, logvar_RD = _linear(self, h_RH, with_bias=False).chunk(2, dim=-1)
        return self.batch_norm(mean_RD, weight_R), logvar_RD + self.bias[mean_RD.shape[1] :]

    def draw(
        self,
        mean_RD: torch.Tensor,
        logvar_RD: torch.Tensor,
        rng: torch.Tensor,
        sample_id_R: torch.Tensor,
        *,
        num_samples: int = 1,
        free_bits: float | torch.Tensor = 0.0,
        stream: int = 0,
        backend: str = "auto",
        prior: LogPrior | None = None,
    ) -> LatentSample:
        """K samples of each row, scored; differentiable in mean, logvar and the prior's parameters.

        Args:
            mean_RD, logvar_RD: from `forward`.
            rng: int64 [2], (seed, step).
            sample_id_R: int64, names the row's noise; outputs and gradients of negative ones are exactly zero.
            num_samples: K.
            free_bits: nats per dimension and row, for `kl_free` under the standard prior.
            stream: tag of the noise.
            backend: of the fused kernel.
            prior: z [n, D] -> log p(z) [n]. None is the standard prior, whose KL is exact; else the KL is
                -H(q) - mean over the samples of log p(z), unbiased.
        """
        drawn = gaussian_rsample_kl(
            mean_RD,
            logvar_RD,
            rng,
            sample_id_R,
            num_samples=num_samples,
            stream=stream,
            free_bits=free_bits,
            backend=backend,
        )
        sample = LatentSample(*drawn)
        if prior is None:
            return sample
        return _under(prior, sample, self.negative_entropy(mean_RD, logvar_RD), sample_id_R < 0)

    def negative_entropy(self, mean_RD: torch.Tensor, logvar_RD: torch.Tensor) -> torch.Tensor:
        """E[log q(z)] of each row, nats [R]."""
        return -0.5 * (_LOG_2PI + 1.0 + logvar_RD).sum(-1)


class DeltaPosterior(GaussianPosterior):
    """A Gaussian with a KL of at least delta nats in every dimension, under the standard prior only.

    With variance v and raw output r the squared mean is 2 delta + 1 + ln v - v + max(0, r), so that the KL is
    (mean^2 + v - ln v - 1) / 2 = delta + max(0, r) / 2. The standard deviation is a sigmoid's share of the way between
    the two at which 2 delta + 1 + ln v - v is zero.

    Means are positive, as published: at each of these variances the means with enough KL are two rays apart, and one
    that could have either sign would jump.

    Source: Razavi et al., "Preventing posterior collapse with delta-VAEs" (2019), equation 4.
    """

    # Times delta, a floor of the squared mean, which gives its root a finite slope; it adds half of that to the KL.
    SMALLEST_SQUARE = 1e-4

    def __init__(self, input_dim: int, latent_dim: int, nats_per_dim: float) -> None:
        super().__init__(input_dim, latent_dim)
        self.delta = nats_per_dim
        self.std_range = _std_range(nats_per_dim)

    def forward(  # type: ignore[override]
        self, h_RH: torch.Tensor, weight_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, logvar), [R, D] each; the weight is not needed."""
        raw_mean_RD, raw_std_RD = _linear(self, h_RH).chunk(2, dim=-1)
        low, high = self.std_range
        logvar_RD = 2.0 * torch.log(low + (high - low) * torch.sigmoid(raw_std_RD))
        # expm1(logvar) - logvar is v - ln v - 1, without cancelling for a small delta, where v is close to 1.
        square_RD = 2.0 * self.delta + logvar_RD - torch.expm1(logvar_RD) + torch.relu(raw_mean_RD)
        return square_RD.clamp(min=self.SMALLEST_SQUARE * self.delta).sqrt(), logvar_RD


class VmfPosterior(nn.Linear):
    """von Mises-Fisher on the unit sphere, kappa fixed (`vmf.py`).

    The mean is a unit vector and logvar is zeros, which nothing reads. Densities are over the sphere's surface, that of
    a prior too; the standard prior is the uniform distribution, and the KL to it a constant.
    """

    # A raw output shorter than this has no direction: it stands for e1, and gets no gradient.
    SHORTEST = 1e-6

    def __init__(self, input_dim: int, latent_dim: int, kappa: float) -> None:
        if latent_dim < 2:
            raise ConfigError(
                f"model.latent_dim = {latent_dim} leaves a vMF posterior no sphere to turn on. Use a "
                "model.latent_dim of 2 or more, or model.posterior.kind=gaussian."
            )
        super().__init__(input_dim, latent_dim)
        self.law = VonMisesFisher(latent_dim, kappa)

    def forward(  # type: ignore[override]
        self, h_RH: torch.Tensor, weight_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, zeros), [R, D] each; the weight is not needed."""
        raw_RD = _linear(self, h_RH)
        is_short_R1 = raw_RD.detach().norm(dim=-1, keepdim=True) < self.SHORTEST
        e1_D = F.pad(raw_RD.new_ones(1), (0, raw_RD.shape[1] - 1))
        return F.normalize(torch.where(is_short_R1, e1_D, raw_RD), dim=-1), torch.zeros_like(raw_RD)

    def draw(
        self,
        mean_RD: torch.Tensor,
        logvar_RD: torch.Tensor,
        rng: torch.Tensor,
        sample_id_R: torch.Tensor,
        *,
        num_samples: int = 1,
        free_bits: float | torch.Tensor = 0.0,
        stream: int = 0,
        backend: str = "auto",
        prior: LogPrior | None = None,
    ) -> LatentSample:
        """As `GaussianPosterior.draw`; `logvar_RD`, `free_bits` and `backend` do nothing."""
        is_padding_R = sample_id_R < 0
        normal_KRD = philox_normal(rng, sample_id_R, mean_RD.shape[1], num_samples=num_samples, stream=stream)
        z_KRD, log_q_KR = self.law.draw(mean_RD.masked_fill(is_padding_R[:, None], 0.0), normal_KRD)
        kl_R = mean_RD.new_full(is_padding_R.shape, self.law.kl).masked_fill(is_padding_R, 0.0)
        log_p_KR = torch.full_like(log_q_KR, self.law.log_uniform).masked_fill(is_padding_R, 0.0)
        sample = LatentSample(
            z=z_KRD.masked_fill(is_padding_R[:, None], 0.0),
            kl=kl_R,
            kl_free=kl_R,
            kl_per_dim=kl_R.new_zeros(0),
            log_q=log_q_KR.masked_fill(is_padding_R, 0.0),
            log_p=log_p_KR,
        )
        if prior is None:
            return sample
        return _under(prior, sample, self.negative_entropy(mean_RD, logvar_RD), is_padding_R)

    def negative_entropy(self, mean_RD: torch.Tensor, logvar_RD: torch.Tensor) -> torch.Tensor:
        """E[log q(z)] of each row, nats [R]: a constant."""
        return mean_RD.new_full(mean_RD.shape[:1], self.law.negative_entropy)


Posterior = GaussianPosterior | VmfPosterior


def build_posterior(config: ModelConfig, input_dim: int) -> Posterior:
    """The posterior of `config.posterior` for encoder outputs of size `input_dim`.

    Raises:
        ConfigError: a vMF posterior with latent_dim 1.
    """
    part = config.posterior
    if isinstance(part, VmfConfig):
        return VmfPosterior(input_dim, config.latent_dim, part.kappa)
    if isinstance(part, DeltaConfig):
        return DeltaPosterior(input_dim, config.latent_dim, part.nats_per_dim)
    return GaussianPosterior(input_dim, config.latent_dim, part.batch_norm_gamma)


def _under(
    prior: LogPrior, sample: LatentSample, negative_entropy_R: torch.Tensor, is_padding_R: torch.Tensor
) -> LatentSample:
    """The sample scored by another prior."""
    log_p_KR = prior(sample.z.flatten(0, 1)).view_as(sample.log_q).masked_fill(is_padding_R, 0.0)
    kl_R = negative_entropy_R.masked_fill(is_padding_R, 0.0) - log_p_KR.mean(0)
    return sample._replace(kl=kl_R, kl_free=kl_R, kl_per_dim=kl_R.new_zeros(0), log_p=log_p_KR)


def _linear(layer: nn.Linear, h_RH: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
    raw = F.linear(h_RH, layer.weight, layer.bias if with_bias else None)
    return raw.to(_wide(raw))


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _std_range(delta: float) -> tuple[float, float]:
    """The two standard deviations at which 2 delta + 1 + ln v - v is zero, v the variance, in float64.

    In s = ln v that is exp(s) - 1 - s = 2 delta, which is 0 at s = 0 and grows to both sides.
    """

    def root(near: float, far: float) -> float:
        for _ in range(200):
            middle = 0.5 * (near + far)
            near, far = (middle, far) if math.expm1(middle) - middle < 2.0 * delta else (near, middle)
        return near

    # exp(s) - 1 - s is above -1 - s, and for positive s above s^2 / 2.
    return math.exp(0.5 * root(0.0, -2.0 * delta - 1.0)), math.exp(0.5 * root(0.0, 2.0 * math.sqrt(delta)))
