"""Sums over the sequences of a packed batch. Shapes: N rows in all, B sequences."""

from __future__ import annotations

from typing import Any

import torch


def segment_sum(x_N: torch.Tensor, cu_seqlens_B1: torch.Tensor) -> torch.Tensor:
    """Sum of each sequence's rows, [B], in a fixed order that only that sequence's own rows enter.

    Args:
        x_N: floating point [N].
        cu_seqlens_B1: int32 or int64 [B + 1], offsets: 0 first, N last, not decreasing. An empty sequence
            sums to 0.

    Raises:
        ValueError: offsets that do not fit (their values are checked on the CPU only, where it costs no
            wait).
    """
    check_offsets(cu_seqlens_B1, x_N.shape[0])
    return _SegmentSum.apply(x_N, cu_seqlens_B1)


def segment_ids(cu_seqlens_B1: torch.Tensor, rows: int) -> torch.Tensor:
    """Which sequence each of the `rows` packed rows belongs to, int64 [N]."""
    # output_size spares the device a wait for the sum of the lengths.
    index_B = torch.arange(cu_seqlens_B1.shape[0] - 1, device=cu_seqlens_B1.device)
    return torch.repeat_interleave(index_B, cu_seqlens_B1.diff(), output_size=rows)


def check_offsets(cu_seqlens_B1: torch.Tensor, rows: int) -> None:
    """Raise when the offsets cannot cut `rows` rows into sequences."""
    if cu_seqlens_B1.dim() != 1 or cu_seqlens_B1.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens_B1.shape)}")
    if cu_seqlens_B1.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens_B1.dtype}")
    if cu_seqlens_B1.device.type != "cpu":
        return
    first, last = int(cu_seqlens_B1[0]), int(cu_seqlens_B1[-1])
    if first != 0 or last != rows or bool((cu_seqlens_B1.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of rows, {rows}; it goes from {first} to {last}"
            + ("" if (first, last) != (0, rows) else " and decreases in between")
        )


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: torch.Tensor, cu_seqlens_B1: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cu_seqlens_B1)
        ctx.rows = x_N.shape[0]
        return torch.segment_reduce(x_N.contiguous(), "sum", offsets=cu_seqlens_B1, axis=0, initial=0)

    @staticmethod
    def backward(ctx: Any, grad_B: torch.Tensor) -> tuple[torch.Tensor, None]:
        (cu_seqlens_B1,) = ctx.saved_tensors
        return grad_B.index_select(0, segment_ids(cu_seqlens_B1, ctx.rows)), None
