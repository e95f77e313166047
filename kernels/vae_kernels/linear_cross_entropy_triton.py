"""Triton backend of `linear_cross_entropy_rows.py`: one kernel forms logits, sums their odds and stores them.

A program owns a block of rows and a range of the vocabulary. Because the reference of a row is known before its logits,
there is no running maximum: each logit costs one exponential, and each program's sum is plain. What is stored are the
odds exp(z - reference), which backward consumes as they are: the factor of a row is applied to x and to x's gradient.
Where no odds were kept the same kernel, referred to lse, writes the gradient itself. Tiles come and go through tensor
descriptors (TMA), before Hopper through plain pointers. Sums run in a fixed order and nothing is atomic, so results
repeat bit for bit.
Shapes: C rows, H hidden, V vocabulary, P splits of the vocabulary; tiles M x W, depth D.
"""

# Triton reads a kernel's annotations as its own, so kernels carry none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vae_kernels.linear_cross_entropy_options import Head, LossOptions
from vae_kernels.linear_cross_entropy_rows import Deltas, RowTerms, Sums
from vae_kernels.linear_cross_entropy_torch import LARGEST_SUM
from vae_kernels.linear_cross_entropy_torch import target_logits as target_logits

# Two programs of the small tile fit on an SM and hide each other's epilogue, which is short at small H. The large tile
# reads less per product, which pays once its main loop is long. Compiled and counted, not timed: see the README.
SMALL_TILE = {"M": 128, "W": 128, "D": 64, "num_warps": 4, "num_stages": 3}
LARGE_TILE = {"M": 128, "W": 256, "D": 64, "num_warps": 8, "num_stages": 3}
# The cap's slope needs the logits beside the odds: more warps, fewer registers each.
CAPPED_TILE = SMALL_TILE | {"num_warps": 8}
# Before Hopper operands pass through registers, and a tile must be smaller.
AMPERE_TILE = {"M": 128, "W": 64, "D": 64, "num_warps": 8, "num_stages": 3}
SINGLE_TILE = {"M": 64, "W": 32, "D": 16, "num_warps": 8, "num_stages": 2}
LARGE_HIDDEN = 2048
# Several rounds of programs on the largest GPU, so that the last round's idle processors are few.
PROGRAMS_WANTED = 1024
# Odds or gradients that are formed to be consumed at once.
WORKSPACE_BYTES = 2**29


def can_keep(dtype: torch.dtype, options: LossOptions) -> bool:
    """Odds: not in float16, which ends at 65,504; not with smoothing, which shifts them by a part of their sum."""
    return dtype != torch.float16 and not options.label_smoothing


def row_pitch(width: int, dtype: torch.dtype) -> int:
    """Elements from row to row: descriptors want multiples of 16 bytes."""
    step = 16 // dtype.itemsize
    return (width + step - 1) // step * step


def prepared(head: Head) -> Head:
    """With operands that descriptors take; those whose rows do not start at multiples of 16 bytes are copied once."""
    return dataclasses.replace(head, x_NH=_aligned(head.x_NH), weight_VH=_aligned(head.weight_VH))


def rows_at_once(head: Head, kept: bool) -> int:
    """How many rows the workspace holds, at least one; kept ones are consumed where they are."""
    if kept:
        return max(1, head.rows)
    return max(1, WORKSPACE_BYTES // (head.vocab * head.x_NH.dtype.itemsize))


def workspace(head: Head) -> torch.Tensor:
    """Memory for a chunk of rows, [C, V], aligned for descriptors."""
    return head.x_NH.new_empty(head.rows, row_pitch(head.vocab, head.x_NH.dtype))[:, : head.vocab]


def sweep(head: Head, reference_C: torch.Tensor, kept_CV: torch.Tensor | None) -> Sums:
    """See `linear_cross_entropy_rows.Backend`; what is kept are the odds."""
    C, V = head.rows, head.vocab
    config = tile_config(head)
    splits, per_split = _split(head, config)
    sums_2PC = reference_C.new_empty(2, splits, C)
    if C:
        constants = _constants(head, kept_CV is not None)
        odds_kernel[(triton.cdiv(C, config["M"]), splits)](
            *_operands(head, reference_C, kept_CV, config), *[reference_C] * 3, sums_2PC[0], sums_2PC[1],
            C, V, head.x_NH.shape[1], per_split,
            SUMS=True, DELTAS=False, WANT_LOGITS=head.options.label_smoothing > 0.0, **constants, **config,
        )  # fmt: skip
    rest_C = sums_2PC[0].sum(0)
    if C:
        config = rescue_config(config, head.x_NH.device)
        rescue_kernel[(triton.cdiv(C, config["M"]),)](
            *_operands(head, reference_C, kept_CV, config), rest_C, C, V, head.x_NH.shape[1],
            GIVEN=False, LIMIT=LARGEST_SUM, **constants, **config,
        )  # fmt: skip
    return Sums(rest_C, sums_2PC[1].sum(0) if head.options.label_smoothing else None)


def complete(head: Head, terms: RowTerms, fill_C: torch.Tensor, kept_CV: torch.Tensor) -> None:
    """Put p_y - 1, in the odds' measure, into the targets' columns."""
    if head.total_vocab != head.vocab and head.rows:
        # All that is likely may be another shard's: this one's odds would leave every range together with their factor.
        config = rescue_config(tile_config(head), head.x_NH.device)
        rescue_kernel[(triton.cdiv(head.rows, config["M"]),)](
            *_operands(head, terms.reference, kept_CV, config), terms.lse.contiguous(),
            head.rows, head.vocab, head.x_NH.shape[1],
            GIVEN=True, LIMIT=math.log(LARGEST_SUM), **_constants(head, True), **config,
        )  # fmt: skip
    fill_C = fill_C * torch.exp(terms.lse - terms.reference)
    if head.options.softcap:
        fill_C = fill_C * (1.0 - (terms.target_logit / head.options.softcap).square())
    at = (torch.arange(head.rows, device=kept_CV.device), head.target_N.clamp(min=0))
    filled_C = fill_C.masked_fill(head.ignored_N, 0.0).to(kept_CV.dtype)
    # A target of another shard has no column here; word 0 keeps its odds.
    kept_CV.index_put_(at, torch.where(head.target_N >= 0, filled_C, kept_CV[at]))


def deltas(
    head: Head, terms: RowTerms, how: Deltas, kept_CV: torch.Tensor | None, out_CV: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `linear_cross_entropy_rows.Backend`; kept odds are answered with as they are."""
    if kept_CV is not None:
        factor_C = how.factor * torch.exp(terms.reference - terms.lse)
        return kept_CV, factor_C.masked_fill(head.ignored_N, 0.0)
    out_CV = workspace(head) if out_CV is None else out_CV
    config = tile_config(head)
    splits, per_split = _split(head, config)
    if head.rows:
        odds_kernel[(triton.cdiv(head.rows, config["M"]), splits)](
            *_operands(head, how.lse, out_CV, config), how.fill, how.shift, how.factor, how.lse, how.lse,
            head.rows, head.vocab, head.x_NH.shape[1], per_split,
            SUMS=False, DELTAS=True, WANT_LOGITS=False, **_constants(head, True), **config,
        )  # fmt: skip
    return out_CV, None


def tile_config(head: Head) -> dict[str, int]:
    """Tile sizes and launch parameters for the operands' dtype and width and the options, on this device."""
    x_NH = head.x_NH
    if x_NH.dtype == torch.float32:
        return SINGLE_TILE
    if not has_tma(x_NH.device):
        return AMPERE_TILE
    large = x_NH.shape[1] >= LARGE_HIDDEN
    if head.options.softcap or (head.options.label_smoothing and not large):
        return CAPPED_TILE
    return LARGE_TILE if large else SMALL_TILE


def has_tma(device: torch.device) -> bool:
    """Whether tiles move through tensor descriptors: on Hopper and its data-center successors, and in the interpreter.

    Other GPUs have less shared memory than the tiles for descriptors take.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def rescue_config(config: dict[str, int], device: torch.device) -> dict[str, int]:
    """Two sweeps in one program need room; speed does not matter."""
    stages = 2 if has_tma(device) else 1
    return config | {"num_warps": 8, "W": min(config["W"], 64), "D": min(config["D"], 32), "num_stages": stages}


def _split(head: Head, config: dict[str, int]) -> tuple[int, int]:
    """(splits of the vocabulary, tiles of a split)."""
    tiles, row_blocks = triton.cdiv(head.vocab, config["W"]), triton.cdiv(head.rows, config["M"])
    per_split = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS_WANTED // max(1, row_blocks))))
    return triton.cdiv(tiles, per_split), per_split


def _operands(
    head: Head, reference_C: torch.Tensor, out_CV: torch.Tensor | None, config: dict[str, int]
) -> tuple[Any, ...]:
    """What both kernels take first; an absent tensor is any valid one, which a constant keeps them from reading."""
    x, weight = head.x_NH, head.weight_VH
    out = x if out_CV is None else out_CV
    pitches = (x.stride(0), weight.stride(0), out.stride(0))
    rest = (reference_C if head.bias_V is None else head.bias_V, head.target_N, reference_C)
    if not has_tma(head.x_NH.device):
        return x, weight, out, *pitches, *rest
    return (
        TensorDescriptor.from_tensor(x, [config["M"], config["D"]]),
        TensorDescriptor.from_tensor(weight, [config["W"], config["D"]]),
        # The tile leaves in two halves: half the shared memory to stage them, and so a second program on the processor.
        TensorDescriptor.from_tensor(out, [config["M"], config["D"] if out_CV is None else config["W"] // 2]),
        *pitches,
        *rest,
    )


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with rows that start at multiples of 16 bytes; itself where they do."""
    width, pitch = matrix.shape[1], row_pitch(matrix.shape[1], matrix.dtype)
    if matrix.stride() == (pitch, 1) and matrix.data_ptr() % 16 == 0:
        return matrix
    return F.pad(matrix, (0, pitch - width))[:, :width]


def _constants(head: Head, store: bool) -> dict[str, Any]:
    # Options are constants of the kernel: a Python float argument may arrive as float64 and drag the sums
    # with it.
    return {
        "SCALE": head.options.logit_scale,
        "CAP": head.options.softcap,
        "HAS_BIAS": head.bias_V is not None,
        "STORE": store,
        "TMA": has_tma(head.x_NH.device),
        # Triton's interpreter multiplies bfloat16 bit patterns.
        "WIDEN": head.x_NH.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1",
    }


@triton.jit
def _load_tile(
    matrix, pitch, first_row, first_column, rows, columns, TMA: tl.constexpr, R: tl.constexpr, D: tl.constexpr
):
    """[R, D] of a [rows, columns] matrix, zeros beyond its ends."""
    if TMA:
        tile = matrix.load([first_row, first_column])
    else:
        row = first_row + tl.arange(0, R).to(tl.int64)
        column = first_column + tl.arange(0, D)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tile = tl.load(matrix + row[:, None] * pitch + column[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _logits_tile(
    x, weight, x_pitch, weight_pitch, bias, first_row, first_word, C, V, H,
    SCALE: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr,
    M: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Final logits of M rows and W words, float32 [M, W]."""
    logits = tl.zeros((M, W), tl.float32)
    for depth in tl.range(0, H, D):
        a = _load_tile(x, x_pitch, first_row, depth, C, H, TMA, M, D)
        b = _load_tile(weight, weight_pitch, first_word, depth, V, H, TMA, W, D)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        logits = tl.dot(a, tl.trans(b), logits, input_precision="ieee")
    if HAS_BIAS:
        word = first_word + tl.arange(0, W)
        logits += tl.load(bias + word, mask=word < V, other=0.0)[None, :]
    if SCALE != 1.0:
        logits *= SCALE
    if CAP > 0.0:
        logits = CAP * _tanh(logits / CAP)
    return logits


@triton.jit
def _tanh(y):
    """By its series near zero, where the exponential form would cancel."""
    square = y * y
    series = y * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(tl.abs(y) < 0.25, series, 2.0 * tl.sigmoid(2.0 * y) - 1.0)


@triton.jit
def _store_tile(
    e, z, out, pitch, first_row, first_word, C, V,
    CAP: tl.constexpr, TMA: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Store the tile, times the cap's slope."""
    if CAP > 0.0:
        e *= 1.0 - (z / CAP) * (z / CAP)
    if TMA:
        low, high = tl.split(tl.permute(tl.reshape(e, (M, 2, W // 2)), (0, 2, 1)))
        out.store([first_row, first_word], low.to(out.dtype))
        out.store([first_row, first_word + W // 2], high.to(out.dtype))
    else:
        row = first_row + tl.arange(0, M).to(tl.int64)
        word = first_word + tl.arange(0, W)
        tl.store(out + row[:, None] * pitch + word[None, :], e, mask=(row < C)[:, None] & (word < V)[None, :])


@triton.jit
def odds_kernel(
    x, weight, out, x_pitch, weight_pitch, out_pitch, bias, target, reference, fill, shift, factor, rest, logit_sum,
    C, V, H, tiles_per_split,
    SCALE: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr, STORE: tl.constexpr, TMA: tl.constexpr,
    SUMS: tl.constexpr, DELTAS: tl.constexpr, WANT_LOGITS: tl.constexpr, WIDEN: tl.constexpr,
    M: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Row block `program_id(0)`, vocabulary split `program_id(1)`.

    SUMS: write, per split, the sums of odds and (WANT_LOGITS) of final logits, float32 [P, C] each; the target's odds
    are 0. DELTAS: store the gradient of the logits by `Deltas`, the reference being lse, in place of the odds.
    """
    first_row = tl.program_id(0) * M
    row = first_row.to(tl.int64) + tl.arange(0, M)
    target_M = tl.load(target + row, mask=row < C, other=-1).to(tl.int32)
    reference_M = tl.load(reference + row, mask=row < C, other=float("inf"))
    rest_M = tl.zeros((M,), tl.float32)
    logit_sum_M = tl.zeros((M,), tl.float32)
    if DELTAS:
        fill_M = tl.load(fill + row, mask=row < C, other=0.0)
        shift_M = tl.load(shift + row, mask=row < C, other=0.0)
        factor_M = tl.load(factor + row, mask=row < C, other=0.0)
    first = tl.program_id(1) * tiles_per_split
    for tile in tl.range(first, tl.minimum(first + tiles_per_split, tl.cdiv(V, W))):
        z = _logits_tile(
            x, weight, x_pitch, weight_pitch, bias, first_row, tile * W, C, V, H,
            SCALE, CAP, HAS_BIAS, TMA, WIDEN, M, W, D,
        )  # fmt: skip
        word = tile * W + tl.arange(0, W)
        e = tl.exp(z - reference_M[:, None])
        if DELTAS:
            e = tl.where(word[None, :] == target_M[:, None], fill_M[:, None], e - shift_M[:, None]) * factor_M[:, None]
        if SUMS:
            e = tl.where((word < V)[None, :] & (word[None, :] != target_M[:, None]), e, 0.0)
            rest_M += tl.sum(e, axis=1)
        if WANT_LOGITS:
            logit_sum_M += tl.sum(tl.where((word < V)[None, :], z, 0.0), axis=1)
        if STORE:
            _store_tile(e, z, out, out_pitch, first_row, tile * W, C, V, CAP, TMA, M, W)
    at = tl.program_id(1).to(tl.int64) * C + row
    if SUMS:
        tl.store(rest + at, rest_M, mask=row < C)
    if WANT_LOGITS:
        tl.store(logit_sum + at, logit_sum_M, mask=row < C)


@triton.jit
def rescue_kernel(
    x, weight, out, x_pitch, weight_pitch, out_pitch, bias, target, reference, rest, C, V, H,
    SCALE: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr, STORE: tl.constexpr, TMA: tl.constexpr,
    WIDEN: tl.constexpr, GIVEN: tl.constexpr, LIMIT: tl.constexpr,
    M: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rows of block `program_id(0)` whose odds overflow get another reference, and their odds are formed anew.

    Without GIVEN `rest` holds the sums: where they exceed LIMIT the reference becomes the largest logit, and `rest` is
    replaced. With GIVEN `rest` holds references, which are taken where they exceed the row's by more than LIMIT. Almost
    always there are none and the program ends at once; the host never has to look.
    """
    first_row = tl.program_id(0) * M
    row = first_row.to(tl.int64) + tl.arange(0, M)
    reference_M = tl.load(reference + row, mask=row < C, other=float("inf"))
    known_M = tl.load(rest + row, mask=row < C, other=0.0)
    # Written so that NaN counts as lost, and an ignored row's infinite reference does not.
    lost_M = (known_M - reference_M > LIMIT) if GIVEN else ((known_M <= LIMIT) == 0)
    if tl.max(lost_M.to(tl.int32), axis=0) > 0:
        target_M = tl.load(target + row, mask=row < C, other=-1).to(tl.int32)
        peak_M = known_M
        if not GIVEN:
            peak_M = tl.full((M,), float("-inf"), tl.float32)
            for tile in tl.range(0, tl.cdiv(V, W)):
                z = _logits_tile(
                    x, weight, x_pitch, weight_pitch, bias, first_row, tile * W, C, V, H,
                    SCALE, CAP, HAS_BIAS, TMA, WIDEN, M, W, D,
                )  # fmt: skip
                known = (tile * W + tl.arange(0, W) < V)[None, :]
                peak_M = tl.maximum(peak_M, tl.max(tl.where(known, z, float("-inf")), axis=1))
        reference_M = tl.where(lost_M, peak_M, reference_M)
        rest_M = tl.zeros((M,), tl.float32)
        for tile in tl.range(0, tl.cdiv(V, W)):
            z = _logits_tile(
                x, weight, x_pitch, weight_pitch, bias, first_row, tile * W, C, V, H,
                SCALE, CAP, HAS_BIAS, TMA, WIDEN, M, W, D,
            )  # fmt: skip
            word = tile * W + tl.arange(0, W)
            other = (word < V)[None, :] & (word[None, :] != target_M[:, None])
            e = tl.where(other, tl.exp(z - reference_M[:, None]), 0.0)
            rest_M += tl.sum(e, axis=1)
            if STORE:
                _store_tile(e, z, out, out_pitch, first_row, tile * W, C, V, CAP, TMA, M, W)
        tl.store(reference + row, reference_M, mask=row < C)
        if not GIVEN:
            tl.store(rest + row, tl.where(lost_M, rest_M, known_M), mask=row < C)
