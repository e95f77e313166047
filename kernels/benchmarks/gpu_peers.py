"""Other people's GPU kernels for the same loss; each is imported when it is made, and says so if it cannot be.

pip install liger-kernel cut-cross-entropy quack-kernels
"""

from __future__ import annotations

import torch
from contender import Contender, Loss
from problem import Inputs

_QUACK_ROWS = 4096


def gpu_peers() -> list[Contender]:
    """liger-kernel, cut-cross-entropy and QuACK, in bfloat16."""
    half = torch.bfloat16
    return [
        Contender("liger_chunk_mem_const_1", half, lambda: _liger(1)),
        Contender("liger_chunk_mem_const_16", half, lambda: _liger(16)),
        Contender("liger_scaled", half, _liger_scaled, tasks=("per_token",)),
        Contender("cut_cross_entropy", half, lambda: _cut({})),
        # Without leaving out what is small, which makes the gradient exact.
        Contender("cut_cross_entropy_unfiltered", half, lambda: _cut({"filter_eps": None})),
        Contender("quack", half, _quack),
    ]


def _liger(chunk_mem_const: int) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(inputs: Inputs, reduction: str) -> torch.Tensor:
        return liger_fused_linear_cross_entropy(
            inputs.x, inputs.weight, inputs.target, reduction=reduction, chunk_mem_const=chunk_mem_const
        )

    return loss


def _liger_scaled() -> Loss:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def loss(inputs: Inputs, _: str) -> torch.Tensor:
        result = LigerFusedLinearScaledCrossEntropyFunction.apply(inputs.x, inputs.weight, inputs.target)
        return result[0] if isinstance(result, tuple) else result

    return loss


def _cut(options: dict[str, None]) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda inputs, reduction: linear_cross_entropy(
        inputs.x, inputs.weight, inputs.target, reduction=reduction, **options
    )


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(inputs: Inputs, reduction: str) -> torch.Tensor:
        # It raises for "none", which then stands in the report as its reason.
        return chunked_linear_cross_entropy(
            inputs.x, inputs.weight, inputs.target, chunk_size=_QUACK_ROWS, reduction=reduction
        )

    return loss
