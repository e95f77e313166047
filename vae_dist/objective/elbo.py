"""The training objective: -ELBO per sequence in nats, as the module DeepSpeed wraps.

    loss = scale * sum over the real sequences b of [ rec_b + beta * KL_b - entropy_weight * H(q_b) ]

KL_b counts as `objective.free_bits` and `objective.rate_control` say; with K > 1 importance samples the bracket is
the negative importance-weighted bound. The scale is where normalisation lives, and the only place: `loss_scale` below.

Shapes: B sequences, R rows with a latent, D latent dimensions, K samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from vae_dist.config.objective_schema import CapacityControl, ObjectiveConfig
from vae_dist.data.stream.batch import Batch
from vae_dist.model.vae import TextVAE, VaeOutput
from vae_dist.model.whole_batch import sum_over_ranks


class ElboTerms(NamedTuple):
    """Detached float32 sums over the real sequences of a micro-batch, for metrics.

    Attributes:
        rec, kl, kl_counted: nats; `kl_counted` is the KL as the loss has it.
        kl_per_dim: [D], nats; [0] where the KL has no dimensions.
        mean, mean_square: [D], of the posterior means, for active units.
        sequences, tokens, rows: counts; `rows` of latents, which are sequences or tokens.
    """

    rec: torch.Tensor
    kl: torch.Tensor
    kl_counted: torch.Tensor
    kl_per_dim: torch.Tensor
    mean: torch.Tensor
    mean_square: torch.Tensor
    sequences: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor

    def plus(self, other: ElboTerms) -> ElboTerms:
        """Sums of both, term by term."""
        return ElboTerms(*(a + b for a, b in zip(self, other, strict=True)))


def loss_scale(world_size: int, real_sequences: int) -> float:
    """world_size / B_real.

    Gradients are averaged over ranks (`engine/gradients.py`, above ZeRO 0 by DeepSpeed); multiplying a rank's sum by
    world_size / B_real makes that average the gradient of the mean over the B_real sequences of the global batch.
    B_real follows from the step, so no reduction is needed, and ZeRO stage, world size and accumulation leave the
    gradient unchanged. The engine's own division by accumulation steps is switched off (`scale_wrt_gas=False`).
    """
    return world_size / real_sequences


class NegativeElbo(nn.Module):
    """-ELBO of a micro-batch (Kingma and Welling 2014, with beta of Higgins et al. 2017)."""

    def __init__(self, vae: TextVAE, objective: ObjectiveConfig, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.vae = vae
        self.objective = objective
        self.autocast = autocast

    def forward(
        self,
        batch: Batch,
        rng: torch.Tensor,
        beta: torch.Tensor,
        scale: torch.Tensor,
        capacity: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ElboTerms]:
        """The scaled loss (scalar float32, differentiable) and the terms behind it.

        Args:
            batch: padded sequences; weight 0 takes a sequence out of loss and metrics.
            rng: int64[2], (seed, step).
            beta, scale: float32 scalars on the batch's device.
            capacity: float32 scalar, nats per sequence; needed by capacity control.
        """
        samples, by_dimension = self.objective.importance_samples, self.objective.free_bits == "dimension"
        with torch.autocast(batch.tokens_BT.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.vae(
                batch,
                rng,
                num_samples=samples,
                free_bits=self.objective.free_bits_nats if by_dimension else 0.0,
                weight_B=batch.weight_B * scale if samples == 1 else None,
            )
        counted_B = self._counted(batch, output, scale, capacity)
        if output.weighted_rec is None:
            loss = scale * (self._importance_weighted(output, beta) * batch.weight_B).sum()
        else:
            loss = output.weighted_rec + beta * scale * (counted_B * batch.weight_B).sum()
        if self.objective.entropy_weight:
            loss = loss + self.objective.entropy_weight * scale * self._negative_entropy(batch, output)
        return loss, _terms(batch, output, counted_B)

    def _counted(
        self, batch: Batch, output: VaeOutput, scale: torch.Tensor, capacity: torch.Tensor | None
    ) -> torch.Tensor:
        """The KL of each sequence as the loss counts it, [B].

        The forms over the batch (free bits on average, capacity) depend on a mean over the whole global batch, which
        no gradient enters: below the floor a KL is replaced by the floor, below its capacity its sign is turned. So
        the sum over the batch has the value and the gradient of max(floor, mean) and of |mean - capacity|.
        """
        form, floor, kl_B = self.objective.free_bits, self.objective.free_bits_nats, output.latent.kl
        if isinstance(self.objective.rate_control, CapacityControl):
            assert capacity is not None, "capacity control is told its capacity at every step"
            mean = _batch_mean(kl_B.detach(), batch.weight_B, scale)
            return torch.sign(mean - capacity) * (kl_B - capacity)
        if form == "none" or floor == 0.0:
            return kl_B
        if form == "dimension":
            return output.latent.kl_free
        if form == "sequence":
            return kl_B.clamp(min=floor)
        kl_BD = kl_B[:, None] if form == "batch_sequence" else _kl_per_dimension(output)
        above_D = _batch_mean(kl_BD.detach(), batch.weight_B, scale) > floor
        return torch.where(above_D, kl_BD, floor).sum(-1)

    def _importance_weighted(self, output: VaeOutput, beta: torch.Tensor) -> torch.Tensor:
        """-log of the mean importance weight of each sequence, [B] (Burda et al. 2016, section 3), beta on its KL.

        DReG (Tucker et al. 2019, section 3): the encoder's gradient passes through z alone, each sample's multiplied by
        its share of the weights once more; everything else has the bound's own gradient. With beta on the KL the
        factor is 1 - beta + beta * share, since what it stands for is beta times the score of q.
        """
        latent, doubly = output.latent, self.objective.estimator == "dreg"
        log_q, log_p = latent.log_q, latent.log_p
        if doubly:
            log_q = _log_posterior_through_z(output)
            if self.vae.prior is not None and self.vae.config.prior.kind == "standard":
                # The fused kernel's goes past z; a prior of another kind reads z already.
                log_p = self.vae.prior(latent.z.flatten(0, 1)).view_as(log_p)
        log_weight_KB = beta * (log_p - log_q) - output.rec_KB
        if doubly and latent.z.requires_grad:
            share_KB1 = torch.softmax(log_weight_KB.detach(), dim=0)[..., None]
            latent.z.register_hook(lambda gradient: gradient * (1.0 - beta + beta * share_KB1))
        return math.log(len(log_weight_KB)) - torch.logsumexp(log_weight_KB, dim=0)

    def _negative_entropy(self, batch: Batch, output: VaeOutput) -> torch.Tensor:
        """-H(q), summed over the real sequences."""
        assert self.vae.posterior is not None
        weight_R = batch.weight_B[batch.sequence_N] if self.vae.per_token else batch.weight_B
        negative_R: torch.Tensor = self.vae.posterior.negative_entropy(output.mean_RD, output.logvar_RD)
        return (negative_R * weight_R).sum()


def _batch_mean(x: torch.Tensor, weight_B: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Mean of [B] or [B, D] over the real sequences of the global batch, whose number is world_size / scale."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    weight = weight_B if x.dim() == 1 else weight_B[:, None]
    return sum_over_ranks((x * weight).sum(0)) * scale / world_size


def _kl_per_dimension(output: VaeOutput) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each row and dimension, [R, D]."""
    mean_RD, logvar_RD = output.mean_RD, output.logvar_RD
    return 0.5 * (mean_RD.square() + logvar_RD.exp() - logvar_RD - 1.0)


def _log_posterior_through_z(output: VaeOutput) -> torch.Tensor:
    """log q(z | x), [K, B], whose only way to the encoder is z."""
    z, mean, logvar = output.latent.z, output.mean_RD.detach(), output.logvar_RD.detach()
    return -0.5 * ((z - mean).square() * (-logvar).exp() + logvar + math.log(2.0 * math.pi)).sum(-1)


@torch.no_grad()
def _terms(batch: Batch, output: VaeOutput, counted_B: torch.Tensor) -> ElboTerms:
    weight_B = batch.weight_B
    weight_R = weight_B if len(output.mean_RD) == len(weight_B) else weight_B[batch.sequence_N]
    mean_RD = output.mean_RD * weight_R[:, None]
    return ElboTerms(
        rec=(output.rec_KB.mean(0) * weight_B).sum(),
        kl=(output.latent.kl * weight_B).sum(),
        kl_counted=(counted_B * weight_B).sum(),
        kl_per_dim=output.latent.kl_per_dim.detach(),
        mean=mean_RD.sum(0),
        mean_square=(mean_RD * output.mean_RD).sum(0),
        sequences=weight_B.sum(),
        tokens=(batch.lengths_B * weight_B).sum(),
        rows=weight_R.sum(),
    )
