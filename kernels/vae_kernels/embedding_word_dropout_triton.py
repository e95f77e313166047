"""Triton backend of `embedding_word_dropout.py`.

Forward: one kernel, which draws the noise and gathers. Backward: a kernel draws the noise again and writes
the words (int32), torch sorts them (stably, so a word's rows keep their order), and a segment sum adds up
each word's rows. A few words have most of the rows, the unknown word above all; lest one program has to add
them all, full chunks of equal words are summed first, by a program each. Nothing is atomic: results repeat
bit for bit.

Shapes: N = B * T rows, V vocabulary, E embedding, C rows of a chunk; tiles R x W.
"""

# Triton reads a kernel's annotations as its own, so kernels carry none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Not tuned: no measurement stands behind these yet.
ROWS = 8
MAX_WIDTH = 256
CHUNK = 128
TOKENS_PER_PROGRAM = 256
NUM_WARPS = 4
# The kernels compare with each kept id in turn.
_MAX_KEEP_IDS = 64


def forward(
    tokens_BT: torch.Tensor,
    weight_VE: torch.Tensor,
    rng: torch.Tensor,
    sample_id_B: torch.Tensor,
    rate: torch.Tensor,
    unk_id: int,
    keep_ids: tuple[int, ...],
    stream: int,
) -> torch.Tensor:
    """[B, T, E] in weight's dtype."""
    _check_keep_ids(keep_ids)
    (B, T), E = tokens_BT.shape, weight_VE.shape[1]
    out_BTE = weight_VE.new_empty(B, T, E)
    if out_BTE.numel():
        word_dropout_forward_kernel[(triton.cdiv(B * T, ROWS),)](
            tokens_BT.contiguous(), weight_VE.contiguous(), rng.contiguous(), sample_id_B.contiguous(), rate, out_BTE,
            B * T, T, E,
            STREAM=stream, UNK_ID=unk_id, KEEP_IDS=keep_ids, R=ROWS, W=width(E), num_warps=NUM_WARPS,
        )  # fmt: skip
    return out_BTE


def backward(
    grad_BTE: torch.Tensor,
    tokens_BT: torch.Tensor,
    rng: torch.Tensor,
    sample_id_B: torch.Tensor,
    rate: torch.Tensor,
    unk_id: int,
    keep_ids: tuple[int, ...],
    stream: int,
    vocab: int,
) -> torch.Tensor:
    """Gradient of weight, [V, E] in the upstream gradient's dtype."""
    B, T, E = grad_BTE.shape
    if grad_BTE.numel() == 0:
        return grad_BTE.new_zeros(vocab, E)
    word_N = tokens_BT.new_empty(B * T, dtype=torch.int32)
    word_dropout_tokens_kernel[(triton.cdiv(B * T, TOKENS_PER_PROGRAM),)](
        tokens_BT.contiguous(), rng.contiguous(), sample_id_B.contiguous(), rate, word_N,
        B * T, T,
        STREAM=stream, UNK_ID=unk_id, KEEP_IDS=keep_ids, R=TOKENS_PER_PROGRAM, num_warps=NUM_WARPS,
    )  # fmt: skip
    return sum_by_word(grad_BTE.reshape(B * T, E).contiguous(), word_N, vocab)


def sum_by_word(grad_NE: torch.Tensor, word_N: torch.Tensor, vocab: int) -> torch.Tensor:
    """Sum of the rows of each word, [V, E] in the rows' dtype; float32 inside, rounded once."""
    chunks, E = grad_NE.shape[0] // CHUNK, grad_NE.shape[1]
    sorted_N, order_N = torch.sort(word_N, stable=True)
    start_V1 = torch.searchsorted(sorted_N, torch.arange(vocab + 1, dtype=torch.int32, device=word_N.device))
    partial_GE = grad_NE.new_empty(chunks, E, dtype=torch.float32)
    total_VE = grad_NE.new_empty(vocab, E)
    tiles = {"R": ROWS, "W": width(E), "num_warps": NUM_WARPS}
    blocks = triton.cdiv(E, tiles["W"])
    if chunks:
        chunk_sum_kernel[(chunks, blocks)](grad_NE, order_N, sorted_N, partial_GE, E, C=CHUNK, **tiles)
    word_sum_kernel[(vocab, blocks)](grad_NE, order_N, start_V1, partial_GE, total_VE, E, C=CHUNK, **tiles)
    return total_VE


def width(embedding: int) -> int:
    """Columns of a tile."""
    return min(MAX_WIDTH, triton.next_power_of_2(embedding))


def _check_keep_ids(keep_ids: tuple[int, ...]) -> None:
    if len(keep_ids) > _MAX_KEEP_IDS:
        raise ValueError(
            f"the Triton kernels take at most {_MAX_KEEP_IDS} keep_ids, got {len(keep_ids)}; use backend='torch'"
        )


@triton.jit
def _words(
    tokens, rng, sample_id, rate, row, inside, T,
    STREAM: tl.constexpr, UNK_ID: tl.constexpr, KEEP_IDS: tl.constexpr,
):  # fmt: skip
    """int64 [R]: the tokens of `row` after word dropout; the uniforms are those of `philox.py` bit for bit."""
    token_R = tl.load(tokens + row, mask=inside, other=0)
    id_R = tl.load(sample_id + row // T, mask=inside, other=0)
    key = (tl.load(rng) & 0xFFFFFFFF) | (tl.load(rng + 1) << 32)
    position_R = (row % T).to(tl.uint32)
    low_R = (id_R & 0xFFFFFFFF).to(tl.uint32)
    high_R = ((id_R >> 32) & 0xFFFFFFFF).to(tl.uint32)
    tag_R = tl.full(position_R.shape, STREAM << 24, tl.uint32)
    bits_R, _, _, _ = tl.philox(key, position_R, low_R, high_R, tag_R)
    replaced_R = (bits_R >> 8).to(tl.float32) * 5.9604644775390625e-08 < tl.load(rate)
    for index in tl.static_range(len(KEEP_IDS)):
        replaced_R &= token_R != KEEP_IDS[index]
    return tl.where(replaced_R, UNK_ID, token_R)


@triton.jit
def word_dropout_forward_kernel(
    tokens, weight, rng, sample_id, rate, out, N, T, E,
    STREAM: tl.constexpr, UNK_ID: tl.constexpr, KEEP_IDS: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Rows of block `program_id(0)` of out [N, E]."""
    # Offsets are int64 throughout: a table or an output may have more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < N
    word = _words(tokens, rng, sample_id, rate, row, inside, T, STREAM, UNK_ID, KEEP_IDS)
    for start in tl.range(0, E, W):
        column = start + tl.arange(0, W)
        within = inside[:, None] & (column < E)[None, :]
        x_RW = tl.load(weight + word[:, None] * E + column[None, :], mask=within)
        tl.store(out + row[:, None] * E + column[None, :], x_RW, mask=within)


@triton.jit
def word_dropout_tokens_kernel(
    tokens, rng, sample_id, rate, out, N, T,
    STREAM: tl.constexpr, UNK_ID: tl.constexpr, KEEP_IDS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Tokens of block `program_id(0)` after word dropout, int32 [N]."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    word = _words(tokens, rng, sample_id, rate, row, row < N, T, STREAM, UNK_ID, KEEP_IDS)
    tl.store(out + row, word.to(tl.int32), mask=row < N)


@triton.jit
def _add_rows(total_RW, grad, order, start, stop, column, E, R: tl.constexpr):
    """total_RW and the rows of sorted positions [start, stop), R of them at a time."""
    for at in tl.range(start, stop, R):
        position = at + tl.arange(0, R)
        row = tl.load(order + position, mask=position < stop, other=0)
        within = (position < stop)[:, None] & (column < E)[None, :]
        total_RW += tl.load(grad + row[:, None] * E + column[None, :], mask=within, other=0.0).to(tl.float32)
    return total_RW


@triton.jit
def chunk_sum_kernel(
    grad, order, word, partial, E, C: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Columns `program_id(1)` of the sum of chunk `program_id(0)` of the sorted rows, if all are one word's."""
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * C
    if tl.load(word + start) == tl.load(word + start + C - 1):
        column = tl.program_id(1) * W + tl.arange(0, W)
        total_RW = _add_rows(tl.zeros((R, W), tl.float32), grad, order, start, start + C, column, E, R)
        tl.store(partial + chunk * E + column, tl.sum(total_RW, axis=0), mask=column < E)


@triton.jit
def word_sum_kernel(
    grad, order, start_of, partial, out, E, C: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Columns `program_id(1)` of the sum of word `program_id(0)`: rows before, full chunks, rows after."""
    word = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * W + tl.arange(0, W)
    start = tl.load(start_of + word)
    stop = tl.load(start_of + word + 1)
    chunk = (start + C - 1) // C
    past_chunks = tl.maximum(stop // C, chunk)
    total_RW = _add_rows(tl.zeros((R, W), tl.float32), grad, order, start, tl.minimum(chunk * C, stop), column, E, R)
    for at in tl.range(chunk, past_chunks, R):
        full = at + tl.arange(0, R)
        within = (full < past_chunks)[:, None] & (column < E)[None, :]
        total_RW += tl.load(partial + full[:, None] * E + column[None, :], mask=within, other=0.0)
    total_RW = _add_rows(total_RW, grad, order, past_chunks * C, stop, column, E, R)
    tl.store(out + word * E + column, tl.sum(total_RW, axis=0), mask=column < E)
