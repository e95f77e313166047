"""The training objective: -ELBO per sequence in nats, as the module DeepSpeed wraps.

    loss = scale * sum over the real sequences b of [ rec_b + beta * KL_b ]

The scale is where normalisation lives, and the only place: `loss_scale` below.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from vae_dist.data.stream.batch import Batch
from vae_dist.model.vae import TextVAE, VaeOutput


class ElboTerms(NamedTuple):
    """Detached float32 sums over the real sequences of a micro-batch, for metrics.

    Attributes:
        rec, kl, kl_counted: nats; `kl_counted` is the KL with free bits, as the loss has it.
        kl_per_dim: [D], nats.
        mean, mean_square: [D], of the posterior means, for active units.
        sequences, tokens: counts.
    """

    rec: torch.Tensor
    kl: torch.Tensor
    kl_counted: torch.Tensor
    kl_per_dim: torch.Tensor
    mean: torch.Tensor
    mean_square: torch.Tensor
    sequences: torch.Tensor
    tokens: torch.Tensor

    def plus(self, other: ElboTerms) -> ElboTerms:
        """Sums of both, term by term."""
        return ElboTerms(*(a + b for a, b in zip(self, other, strict=True)))


def loss_scale(world_size: int, real_sequences: int) -> float:
    """world_size / B_real.

    DeepSpeed averages gradients over ranks; multiplying a rank's sum by world_size / B_real makes that average
    the gradient of the mean over the B_real sequences of the global batch. B_real follows from the step, so
    no reduction is needed, and ZeRO stage, world size and accumulation leave the gradient unchanged. The
    engine's own division by accumulation steps is switched off (`scale_wrt_gas=False`).
    """
    return world_size / real_sequences


class NegativeElbo(nn.Module):
    """-ELBO of a micro-batch (Kingma and Welling 2014, with beta of Higgins et al. 2017)."""

    def __init__(self, vae: TextVAE, free_bits_nats_per_dim: float, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.vae = vae
        self.free_bits = free_bits_nats_per_dim
        self.autocast = autocast

    def forward(
        self, batch: Batch, rng: torch.Tensor, beta: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, ElboTerms]:
        """The scaled loss (scalar float32, differentiable) and the terms behind it.

        Args:
            batch: padded sequences; weight 0 takes a sequence out of loss and metrics.
            rng: int64[2], (seed, step).
            beta, scale: float32 scalars on the batch's device.
        """
        device_type = batch.tokens_BT.device.type
        with torch.autocast(device_type, self.autocast, enabled=self.autocast is not None):
            output = self.vae(batch, rng, free_bits=self.free_bits, weight_B=batch.weight_B * scale)
        kl_B = output.latent.kl_free if self.free_bits > 0 else output.latent.kl
        loss = output.weighted_rec + beta * scale * (kl_B * batch.weight_B).sum()
        return loss, _terms(batch, output, kl_B)


@torch.no_grad()
def _terms(batch: Batch, output: VaeOutput, counted_B: torch.Tensor) -> ElboTerms:
    weight_B = batch.weight_B
    mean_BD = output.mean_BD * weight_B[:, None]
    return ElboTerms(
        rec=(output.rec_KB[0] * weight_B).sum(),
        kl=(output.latent.kl * weight_B).sum(),
        kl_counted=(counted_B * weight_B).sum(),
        kl_per_dim=output.latent.kl_per_dim.detach(),
        mean=mean_BD.sum(0),
        mean_square=mean_BD.square().sum(0),
        sequences=weight_B.sum(),
        tokens=(batch.lengths_B * weight_B).sum(),
    )
