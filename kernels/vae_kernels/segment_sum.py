"""Sums over consecutive segments."""

from __future__ import annotations

import torch


def segment_sum(x_N: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sum of each segment x[cu_seqlens[b] : cu_seqlens[b + 1]], [B]; differentiable, order fixed.

    Args:
        x_N: float values.
        cu_seqlens: integer [B + 1], ascending from 0 to N. An empty segment sums to 0.
    """
    return torch.segment_reduce(x_N, "sum", offsets=cu_seqlens.to(torch.int64), initial=0.0)
