"""Sums over the whole global batch, through which gradients flow, and the normalisation that needs them.

Shapes: R rows of this rank (real ones have a weight above 0, padding has weight 0), D dimensions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The sum of `x` over all ranks, on every rank alike; `x` itself in a single process. Collective.

    Backward sums over ranks too: a rank's `x` moves what every rank makes of the total. With gradients averaged over
    ranks, the sum over a rank's own rows therefore enters its loss times the world size (as `loss_scale` has it), and
    a term that every rank computes alike from totals enters once, not times the world size.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return cast(torch.Tensor, _SumOverRanks.apply(x))


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, _SumOverRanks.apply(grad))


class WholeBatchNorm(nn.Module):
    """gamma (x - m) / s + shift: m and s over the real rows of all ranks, gamma fixed, shift learned.

    In training the mean square of an output dimension is gamma^2 + shift^2 exactly, so that for posterior means
    E[KL to N(0, I)] >= sum over D of (gamma^2 + shift^2) / 2 nats (Zhu et al., "A batch normalized inference network
    keeps the KL vanishing away", 2020, section 3). Hence s has a floor, and a low one, in place of the usual 1e-5 added
    to the variance, which is above that of means at the start of small weights.

    In evaluation m and s are running averages of the training batches' (torch's momentum and unbiased variance). They
    move in training and under grad only, alike on all ranks. A batch of one real row gives the shift for that row
    (it is its own mean), one of none gives finite numbers that nothing uses; neither moves the averages.
    """

    MOMENTUM = 0.1
    SMALLEST_VARIANCE = 1e-12

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, dim: int, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.shift = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x_RD: torch.Tensor, weight_R: torch.Tensor) -> torch.Tensor:
        """[R, D], dtype of x; padding rows as if their x were 0 while training. Collective while training."""
        if not self.training:
            return self._scaled(x_RD - self.running_mean, self.running_var)
        padding_R1 = (weight_R <= 0)[:, None]
        x_RD = x_RD.masked_fill(padding_R1, 0.0)
        count = (~padding_R1).sum(dtype=x_RD.dtype)
        totals = sum_over_ranks(torch.cat([x_RD.sum(0), count[None]]))
        sum_D, count = totals[:-1], totals[-1].detach()
        mean_D = sum_D / count.clamp(min=1.0)
        # A second pass: the mean of squares less the square of the mean would cancel where means are large.
        deviation_RD = x_RD - mean_D
        squares_D = sum_over_ranks(deviation_RD.masked_fill(padding_R1, 0.0).square().sum(0))
        if torch.is_grad_enabled():
            self._follow(mean_D.detach(), squares_D.detach(), count)
        return self._scaled(deviation_RD, squares_D / count.clamp(min=1.0))

    def _scaled(self, deviation_RD: torch.Tensor, var_D: torch.Tensor) -> torch.Tensor:
        return self.gamma * deviation_RD * var_D.clamp(min=self.SMALLEST_VARIANCE).rsqrt() + self.shift

    def _follow(self, mean_D: torch.Tensor, squares_D: torch.Tensor, count: torch.Tensor) -> None:
        # One row tells nothing of a variance.
        momentum = self.MOMENTUM * (count >= 2.0).to(mean_D.dtype)
        self.running_mean.lerp_(mean_D, momentum)
        self.running_var.lerp_(squares_D / (count - 1.0).clamp(min=1.0), momentum)
