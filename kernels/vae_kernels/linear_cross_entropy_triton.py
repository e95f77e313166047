"""Triton backend of `linear_cross_entropy.py`.

Forward: one kernel; a program owns a block of rows and a range of the vocabulary and keeps a running maximum
and sum, so no logits reach memory. Backward: for one slice of the vocabulary at a time, a kernel forms the
logits again and writes their gradient in the inputs' dtype ([N, S] with S * N bounded); two matrix products
of torch consume it. Sums run in a fixed order and nothing is atomic, so results repeat bit for bit.

Shapes: N rows, H hidden, V vocabulary, S vocabulary slice, P splits; tiles M x W, depth D.
"""

# Triton reads a kernel's annotations as its own, so kernels carry none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from vae_kernels.linear_cross_entropy_options import Gradients, LossOptions, matmul_wide, row_loss

# Tile sizes by operand width. Not tuned: no measurement stands behind them yet.
HALF_CONFIG = {"M": 128, "W": 128, "D": 64, "num_warps": 8, "num_stages": 3}
SINGLE_CONFIG = {"M": 64, "W": 64, "D": 32, "num_warps": 8, "num_stages": 2}
# Enough programs to fill a large GPU when there are few rows.
PROGRAMS_WANTED = 256
# Gradient of one vocabulary slice's logits.
SLICE_BYTES = 2**26


def nll(
    x_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    options: LossOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [N], log-sum-exp [N])."""
    (N, H), V = x_NH.shape, weight_VH.shape[0]
    config = tile_config(x_NH.dtype)
    tiles, row_blocks = triton.cdiv(V, config["W"]), triton.cdiv(N, config["M"])
    per_split = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS_WANTED // max(1, row_blocks))))
    splits = triton.cdiv(tiles, per_split)
    ignored_N = target_N == options.ignore_index
    sums_4PN = x_NH.new_empty(4, splits, N, dtype=torch.float32)
    if N:
        lce_forward_kernel[(row_blocks, splits)](
            x_NH.contiguous(), weight_VH.contiguous(), x_NH if bias_V is None else bias_V.contiguous(),
            target_N.masked_fill(ignored_N, -1),
            sums_4PN[0], sums_4PN[1], sums_4PN[2], sums_4PN[3],
            N, V, H, per_split,
            **_constants(x_NH, bias_V, options), **config,
        )  # fmt: skip
    peak_PN, sum_PN, target_logit_PN, logit_sum_PN = sums_4PN
    peak_N = peak_PN.amax(0)
    lse_N = peak_N + torch.log((sum_PN * torch.exp(peak_PN - peak_N)).sum(0))
    mean_N = logit_sum_PN.sum(0) / V if options.label_smoothing else None
    return row_loss(lse_N, target_logit_PN.sum(0), mean_N, ignored_N, options), lse_N


def gradients(
    x_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_N: torch.Tensor,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> Gradients:
    """Gradients of (x, weight, bias) for the upstream gradient of each row's loss."""
    N, V = x_NH.shape[0], weight_VH.shape[0]
    ignored_N = target_N == options.ignore_index
    target_N = target_N.masked_fill(ignored_N, -1)
    grad_N = grad_N.float().masked_fill(ignored_N, 0.0)
    grad_x_NH = torch.zeros_like(x_NH, dtype=torch.float32) if needs[0] else None
    grad_weight_VH = torch.zeros_like(weight_VH) if needs[1] else None
    grad_bias_V = None if bias_V is None or not needs[2] else torch.zeros_like(bias_V)
    width = slice_width(N, x_NH)
    for start in range(0, V, width) if N else ():
        stop = min(start + width, V)
        delta_NS = _delta(x_NH, weight_VH, bias_V, target_N, lse_N, grad_N, options, start, stop)
        if grad_x_NH is not None:
            grad_x_NH += matmul_wide(delta_NS, weight_VH[start:stop])
        if grad_weight_VH is not None:
            grad_weight_VH[start:stop] = matmul_wide(delta_NS.t(), x_NH)
        if grad_bias_V is not None:
            grad_bias_V[start:stop] = delta_NS.sum(0, dtype=torch.float32)
    return None if grad_x_NH is None else grad_x_NH.to(x_NH.dtype), grad_weight_VH, grad_bias_V


def nll_and_gradients(
    x_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    grad_N: torch.Tensor,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor, Gradients]:
    """(loss [N], gradients) for upstream gradients known beforehand; the logits are formed twice."""
    nll_N, lse_N = nll(x_NH, weight_VH, bias_V, target_N, options)
    return nll_N, gradients(x_NH, weight_VH, bias_V, target_N, lse_N, grad_N, options, needs)


def tile_config(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch parameters for inputs of this dtype."""
    return SINGLE_CONFIG if dtype == torch.float32 else HALF_CONFIG


def slice_width(rows: int, x_NH: torch.Tensor) -> int:
    """Vocabulary entries whose gradients for all rows fit into SLICE_BYTES: a multiple of the tile."""
    tile = tile_config(x_NH.dtype)["W"]
    return max(1, SLICE_BYTES // max(1, rows * x_NH.element_size()) // tile) * tile


def _delta(
    x_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_N: torch.Tensor,
    options: LossOptions,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Gradient of the logits of vocabulary [start, stop), [N, S], inputs' dtype."""
    (N, H), V = x_NH.shape, weight_VH.shape[0]
    config = tile_config(x_NH.dtype)
    delta_NS = x_NH.new_empty(N, stop - start)
    lce_delta_kernel[(triton.cdiv(N, config["M"]), triton.cdiv(stop - start, config["W"]))](
        x_NH.contiguous(), weight_VH.contiguous(), x_NH if bias_V is None else bias_V.contiguous(),
        target_N, lse_N, grad_N, delta_NS,
        N, V, H, start, stop - start,
        **_constants(x_NH, bias_V, options), **config,
    )  # fmt: skip
    return delta_NS


def _constants(x_NH: torch.Tensor, bias_V: torch.Tensor | None, options: LossOptions) -> dict[str, Any]:
    # Options are constants of the kernel: a Python float argument may arrive as float64 and drag the sums
    # with it.
    return {
        "SCALE": options.logit_scale,
        "CAP": options.softcap or 0.0,
        "SMOOTHING": options.label_smoothing,
        "Z_LOSS": options.z_loss,
        "HAS_BIAS": bias_V is not None,
        # Triton's interpreter multiplies bfloat16 bit patterns.
        "WIDEN": x_NH.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1",
    }


@triton.jit
def _logits_tile(
    x, weight, bias, row, col, N, V, H,
    SCALE: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr,
    M: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Final logits of rows `row` and vocabulary `col` (int64), float32 [M, W]."""
    logits = tl.zeros((M, W), tl.float32)
    for depth in tl.range(0, H, D):
        h = depth + tl.arange(0, D)
        a = tl.load(x + row[:, None] * H + h[None, :], mask=(row < N)[:, None] & (h < H)[None, :], other=0.0)
        b = tl.load(weight + col[:, None] * H + h[None, :], mask=(col < V)[:, None] & (h < H)[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        logits = tl.dot(a, tl.trans(b), logits, input_precision="ieee")
    if HAS_BIAS:
        logits += tl.load(bias + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
    logits *= SCALE
    if CAP > 0.0:
        logits = CAP * (2.0 * tl.sigmoid(2.0 * (logits / CAP)) - 1.0)
    return logits


@triton.jit
def lce_forward_kernel(
    x, weight, bias, target, peak, total, target_logit, logit_sum,
    N, V, H, tiles_per_split,
    SCALE: tl.constexpr, CAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr, M: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Row block `program_id(0)`, vocabulary split `program_id(1)`.

    Writes each split's maximum, sum of exponentials, target logit (0 where the target lies elsewhere) and sum
    of logits, float32 [P, N] each.
    """
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    split = tl.program_id(1).to(tl.int64)
    target_M = tl.load(target + row, mask=row < N, other=-1)
    peak_M = tl.full((M,), float("-inf"), tl.float32)
    total_M = tl.zeros((M,), tl.float32)
    target_logit_M = tl.zeros((M,), tl.float32)
    logit_sum_M = tl.zeros((M,), tl.float32)
    first = split * tiles_per_split
    for tile in tl.range(first, tl.minimum(first + tiles_per_split, tl.cdiv(V, W))):
        col = tile * W + tl.arange(0, W)
        z = _logits_tile(x, weight, bias, row, col, N, V, H, SCALE, CAP, HAS_BIAS, WIDEN, M, W, D)
        known = (col < V)[None, :]
        target_logit_M += tl.sum(tl.where(col[None, :] == target_M[:, None], z, 0.0), axis=1)
        if SMOOTHING > 0.0:
            logit_sum_M += tl.sum(tl.where(known, z, 0.0), axis=1)
        z = tl.where(known, z, float("-inf"))
        higher_M = tl.maximum(peak_M, tl.max(z, axis=1))
        total_M = total_M * tl.exp(peak_M - higher_M) + tl.sum(tl.exp(z - higher_M[:, None]), axis=1)
        peak_M = higher_M
    at = split * N + row
    tl.store(peak + at, peak_M, mask=row < N)
    tl.store(total + at, total_M, mask=row < N)
    tl.store(target_logit + at, target_logit_M, mask=row < N)
    tl.store(logit_sum + at, logit_sum_M, mask=row < N)


@triton.jit
def lce_delta_kernel(
    x, weight, bias, target, lse, grad, delta,
    N, V, H, start, width,
    SCALE: tl.constexpr, CAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr, M: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Row block `program_id(0)`, tile `program_id(1)` of the vocabulary slice.

    Writes delta [N, width], the gradient of x @ weight.T + bias. Ignored rows carry target -1 and upstream
    gradient 0.
    """
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    local = tl.program_id(1).to(tl.int64) * W + tl.arange(0, W)
    col = start + local
    target_M = tl.load(target + row, mask=row < N, other=-1)
    lse_M = tl.load(lse + row, mask=row < N, other=0.0)
    grad_M = tl.load(grad + row, mask=row < N, other=0.0)
    z = _logits_tile(x, weight, bias, row, col, N, V, H, SCALE, CAP, HAS_BIAS, WIDEN, M, W, D)
    d = tl.exp(z - lse_M[:, None])
    if Z_LOSS != 0.0:
        d *= 1.0 + 2.0 * Z_LOSS * lse_M[:, None]
    if SMOOTHING > 0.0:
        d -= SMOOTHING / V
    # The target's p - 1 is formed in float32: rounded to bfloat16 first, it would be lost for a sure target.
    d = tl.where(col[None, :] == target_M[:, None], d - (1.0 - SMOOTHING), d)
    if CAP > 0.0:
        d *= 1.0 - (z / CAP) * (z / CAP)
    d = tl.where((target_M >= 0)[:, None], d * (grad_M * SCALE)[:, None], 0.0)
    tl.store(delta + row[:, None] * width + local[None, :], d, mask=(row < N)[:, None] & (local < width)[None, :])
