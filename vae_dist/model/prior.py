"""Priors p(z) of the latent: standard normal, uniform on the sphere, mixtures of Gaussians, VampPrior, flow.

Shapes: R rows (sequences, or tokens where each has a latent), C components, D latent dimensions, T tokens of a
pseudo-input, E embedding. Densities are in nats; float32, or float64 for float64 rows, also under autocast.

ZeRO-3 gathers a prior's parameters in `forward` alone. `from_noise` reads them, too: it is for whole weights, after
training, as everything that generates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from vae_dist.config.model_schema import (
    FlowPriorConfig,
    MixturePriorConfig,
    ModelConfig,
    StandardPriorConfig,
    VampPriorConfig,
    VmfConfig,
)
from vae_dist.errors import ConfigError, ModelError
from vae_dist.model.flow import AffineCoupling
from vae_dist.model.mixture import Components, draw, log_mixture

Encode = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(embeddings_CTE, lengths_C) -> mean [.., D], logvar [.., D] of the posterior: the model's own encoder."""

# Share of a fresh mixture's unit variance that lies between its means. Were it much larger, components would in many
# dimensions be so far apart that each z belonged to one alone and the rest could not learn.
_SPREAD = 0.1


class Prior(nn.Module):
    """A distribution of z that can be evaluated and drawn from."""

    def forward(self, z_RD: torch.Tensor, encode: Encode | None = None) -> torch.Tensor:
        """log p(z), [R], in nats; `encode` is needed by a VampPrior alone."""
        raise NotImplementedError

    def from_noise(
        self, normal_RD: torch.Tensor, uniform_R: torch.Tensor, encode: Encode | None = None
    ) -> torch.Tensor:
        """z ~ p, [R, D], from standard normal numbers and uniform ones in [0, 1); a row's z depends on its own noise
        alone."""
        raise NotImplementedError


class StandardPrior(Prior):
    """N(0, I)."""

    def forward(self, z_RD: torch.Tensor, encode: Encode | None = None) -> torch.Tensor:
        return _log_standard_normal(_widened(z_RD))

    def from_noise(
        self, normal_RD: torch.Tensor, uniform_R: torch.Tensor, encode: Encode | None = None
    ) -> torch.Tensor:
        return normal_RD


class SpherePrior(Prior):
    """The uniform distribution on the unit sphere, a density with respect to its surface: 1 / area, for |z| = 1."""

    def forward(self, z_RD: torch.Tensor, encode: Encode | None = None) -> torch.Tensor:
        half = z_RD.shape[-1] / 2
        log_area = math.log(2.0) + half * math.log(math.pi) - math.lgamma(half)
        return torch.full_like(_widened(z_RD[:, 0]), -log_area)

    def from_noise(
        self, normal_RD: torch.Tensor, uniform_R: torch.Tensor, encode: Encode | None = None
    ) -> torch.Tensor:
        return normal_RD / normal_RD.norm(dim=-1, keepdim=True)


class FlowPrior(Prior):
    """z = f(u), u ~ N(0, I), f of affine coupling layers that change alternate halves; starts as N(0, I)."""

    def __init__(self, dim: int, layers: int, hidden_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AffineCoupling(dim, hidden_dim, change_first=i % 2 == 1) for i in range(layers))

    def forward(self, z_RD: torch.Tensor, encode: Encode | None = None) -> torch.Tensor:
        with torch.autocast(z_RD.device.type, enabled=False):
            u_RD = _widened(z_RD)
            log_det_R = torch.zeros_like(u_RD[:, 0])
            for layer in self.layers:
                u_RD, log_det_of_layer_R = layer(u_RD)
                log_det_R = log_det_R + log_det_of_layer_R
            return _log_standard_normal(u_RD) + log_det_R

    def from_noise(
        self, normal_RD: torch.Tensor, uniform_R: torch.Tensor, encode: Encode | None = None
    ) -> torch.Tensor:
        with torch.autocast(normal_RD.device.type, enabled=False):
            z_RD = normal_RD
            for layer in reversed(self.layers):
                assert isinstance(layer, AffineCoupling)
                z_RD = layer.inverse(z_RD)
            return z_RD


class Mixture(Prior):
    """A mixture of diagonal Gaussians, wherever `components` takes them from."""

    def components(self, encode: Encode | None) -> Components:
        """The mixture as it is now."""
        raise NotImplementedError

    def forward(self, z_RD: torch.Tensor, encode: Encode | None = None) -> torch.Tensor:
        return log_mixture(z_RD, self.components(encode))

    def from_noise(
        self, normal_RD: torch.Tensor, uniform_R: torch.Tensor, encode: Encode | None = None
    ) -> torch.Tensor:
        return draw(normal_RD, uniform_R, self.components(encode))


class MixturePrior(Mixture):
    """Learned weights, means and variances. It starts near N(0, I): equal weights, unit variance in all."""

    def __init__(self, components: int, dim: int) -> None:
        super().__init__()
        self.logits_C = nn.Parameter(torch.zeros(components))
        self.mean_CD = nn.Parameter(_SPREAD**0.5 * torch.randn(components, dim))
        self.logvar_CD = nn.Parameter(torch.full((components, dim), math.log(1.0 - _SPREAD)))

    def components(self, encode: Encode | None = None) -> Components:
        return Components(self.logits_C.double().log_softmax(0), self.mean_CD, self.logvar_CD)


class FittedMixture(Mixture):
    """Buffers, not parameters: what `evaluate.mixture_em` found after training, saved with the model.

    Source: Ghosh et al., "From variational to deterministic autoencoders" (2020), section 4: ex-post density.
    """

    log_weight_C: torch.Tensor
    mean_CD: torch.Tensor
    logvar_CD: torch.Tensor

    def __init__(self, components: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("log_weight_C", torch.full((components,), math.nan))
        self.register_buffer("mean_CD", torch.full((components, dim), math.nan))
        self.register_buffer("logvar_CD", torch.full((components, dim), math.nan))

    @torch.no_grad()
    def store(self, components: Components) -> None:
        """Keep a fit, rounded to this module's dtype."""
        for name, value in components._asdict().items():
            getattr(self, name).copy_(value)

    def components(self, encode: Encode | None = None) -> Components:
        """The stored fit.

        Raises:
            ModelError: nothing was stored yet.
        """
        if self.mean_CD.isnan().any():
            raise ModelError(
                "This model's mixture for sampling (model.sampling_components) was not fitted yet: that happens when "
                "a run ends. Let the run finish, or sample from the prior."
            )
        return Components(self.log_weight_C, self.mean_CD, self.logvar_CD)


class VampPrior(Mixture):
    """The mean of the posteriors of learned pseudo-inputs, sequences of embeddings that are no words.

    Gradients reach the pseudo-inputs and the encoder that reads them. Source: Tomczak and Welling, "VAE with a
    VampPrior" (2018), section 2.
    """

    def __init__(self, components: int, pseudo_tokens: int, embedding_dim: int) -> None:
        super().__init__()
        # Of the size of the model's own embeddings: rows of about unit norm.
        self.pseudo_CTE = nn.Parameter(embedding_dim**-0.5 * torch.randn(components, pseudo_tokens, embedding_dim))

    def components(self, encode: Encode | None) -> Components:
        """The posteriors of the pseudo-inputs, of equal weight; of each of their tokens where tokens have latents."""
        if encode is None:
            raise TypeError("a VampPrior needs `encode`")
        count, length, _ = self.pseudo_CTE.shape
        lengths_C = torch.full((count,), length, dtype=torch.int64, device=self.pseudo_CTE.device)
        mean_CD, logvar_CD = (part.flatten(0, -2) for part in encode(self.pseudo_CTE, lengths_C))
        return Components(mean_CD.new_full(mean_CD.shape[:1], -math.log(len(mean_CD))), mean_CD, logvar_CD)


def build_prior(config: ModelConfig) -> Prior:
    """The prior that `config.prior` names.

    Raises:
        ConfigError: it does not go with the posterior or with the number of dimensions.
    """
    part, dim = config.prior, config.latent_dim
    if isinstance(config.posterior, VmfConfig):
        if not isinstance(part, StandardPriorConfig):
            raise ConfigError(
                f"model.prior.kind = {part.kind} is a density in space, and model.posterior.kind = vmf lives on the "
                "sphere. Use model.prior.kind=standard (uniform on the sphere), or another posterior."
            )
        return SpherePrior()
    if isinstance(part, MixturePriorConfig):
        return MixturePrior(part.components, dim)
    if isinstance(part, VampPriorConfig):
        return VampPrior(part.components, part.pseudo_tokens, config.embedding_dim)
    if isinstance(part, FlowPriorConfig):
        if dim < 2:
            raise ConfigError(
                "model.prior.kind = flow moves one half of z by the other, and model.latent_dim = 1 has no halves. Use "
                "model.latent_dim=2 or more, or model.prior.kind=mixture."
            )
        return FlowPrior(dim, part.layers, part.hidden_dim)
    return StandardPrior()


def build_sampling_prior(config: ModelConfig) -> FittedMixture:
    """The empty mixture that EM fills after training.

    Raises:
        ConfigError: the posterior's z lie on the sphere, which Gaussians leave.
    """
    if isinstance(config.posterior, VmfConfig):
        raise ConfigError(
            f"model.sampling_components = {config.sampling_components} fits Gaussians, and model.posterior.kind = vmf "
            "lives on the sphere. Use model.sampling_components=0, or another posterior."
        )
    return FittedMixture(config.sampling_components, config.latent_dim)


def _widened(z_RD: torch.Tensor) -> torch.Tensor:
    return z_RD.to(torch.promote_types(z_RD.dtype, torch.float32))


def _log_standard_normal(z_RD: torch.Tensor) -> torch.Tensor:
    return -0.5 * (z_RD.square() + math.log(2 * math.pi)).sum(-1)
