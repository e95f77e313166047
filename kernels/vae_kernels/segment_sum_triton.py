"""Triton backend of `segment_sum.py`: a program per sequence. Shapes: N rows, B sequences; tiles of W rows."""

# Triton reads a kernel's annotations as its own, so kernels carry none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Not tuned: no measurement stands behind it yet.
CONFIG = {"W": 128, "num_warps": 1}


def total(x_N: torch.Tensor, cu_seqlens_B1: torch.Tensor) -> torch.Tensor:
    """Sum of each sequence's rows, [B] in the rows' dtype; float32 inside, rounded once."""
    sequences = cu_seqlens_B1.shape[0] - 1
    total_B = x_N.new_empty(sequences)
    if sequences:
        segment_sum_kernel[(sequences,)](x_N.contiguous(), cu_seqlens_B1.contiguous(), total_B, **CONFIG)
    return total_B


def spread(y_B: torch.Tensor, cu_seqlens_B1: torch.Tensor, rows: int) -> torch.Tensor:
    """Each sequence's value in all of its rows, [N]."""
    sequences = cu_seqlens_B1.shape[0] - 1
    x_N = y_B.new_empty(rows)
    if sequences:
        segment_spread_kernel[(sequences,)](y_B.contiguous(), cu_seqlens_B1.contiguous(), x_N, **CONFIG)
    return x_N


@triton.jit
def segment_sum_kernel(x, offsets, out, W: tl.constexpr):
    """Sequence `program_id(0)`: its rows in tiles that start at its first row, whatever lies before."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + sequence).to(tl.int64)
    stop = tl.load(offsets + sequence + 1).to(tl.int64)
    total_W = tl.zeros((W,), tl.float32)
    for at in tl.range(start, stop, W):
        row = at + tl.arange(0, W)
        total_W += tl.load(x + row, mask=row < stop, other=0.0).to(tl.float32)
    tl.store(out + sequence, tl.sum(total_W, axis=0))


@triton.jit
def segment_spread_kernel(y, offsets, out, W: tl.constexpr):
    """Sequence `program_id(0)`: its value to each of its rows."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + sequence).to(tl.int64)
    stop = tl.load(offsets + sequence + 1).to(tl.int64)
    value = tl.load(y + sequence)
    for at in tl.range(start, stop, W):
        row = at + tl.arange(0, W)
        tl.store(out + row, tl.zeros((W,), value.dtype) + value, mask=row < stop)
