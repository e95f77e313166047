"""Embedding of tokens, some of them replaced by the unknown word: word dropout of a decoder's input.

Shapes: B sequences, T positions, V vocabulary, E embedding.

Source: Bowman et al., "Generating sentences from a continuous space" (CoNLL 2016), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vae_kernels.autograd import first_order_only
from vae_kernels.backend import on_device_of, resolve_backend
from vae_kernels.philox import check_rng, philox_uniform


def embedding_word_dropout(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    rng: torch.Tensor,
    sample_id: torch.Tensor,
    *,
    rate: float | torch.Tensor,
    unk_id: int,
    keep_ids: Sequence[int] = (),
    stream: int,
    backend: str = "auto",
) -> torch.Tensor:
    """Rows of `weight` for `tokens`, [B, T, E] in weight's dtype.

    Entry (b, t) is the row of unk_id where philox_uniform(rng, sample_id[b], t, stream) < rate and the token
    is not in keep_ids. Which entries those are is found again in backward and never stored. The gradient of
    weight is summed in float32 (float64 for float64) in a fixed order and rounded once: it repeats bit for
    bit. Second derivatives are refused.

    Args:
        tokens: int64 [B, T], in [0, V). Padding is embedded like any token; its upstream gradient is the
            caller's.
        weight: [V, E], float16, bfloat16, float32 or float64.
        rng: int64 [2], (seed, step).
        sample_id: int64 [B], position of the row's sequence in the run's global order.
        rate: probability of a replacement, a number in [0, 1] or a 0-d tensor (whose value is not checked: the
            host would have to wait for it), used in float32; no gradient.
        unk_id: the token that replaces.
        keep_ids: tokens that are never replaced.
        stream: tag of the noise in [0, 256).
        backend: "auto", "triton" or "torch".

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or numbers that do not fit.
        IndexError: a token outside the vocabulary (found on the CPU only; on a GPU it is undefined, as in
            torch).
        RuntimeError: backend="triton" where Triton cannot run.
    """
    _check(tokens, weight, sample_id, rng)
    check_rng(rng, sample_id, stream)
    keep_ids = sorted(set(keep_ids))
    for name, word in (("unk_id", unk_id), *(("an entry of keep_ids", kept) for kept in keep_ids)):
        if not 0 <= word < weight.shape[0]:
            raise ValueError(f"{name} is {word}; it must be in [0, {weight.shape[0]}), the rows of weight")
    rate = _rate(rate, weight.device)
    return _embed(tokens, weight, rng, sample_id, rate, unk_id, keep_ids, stream, backend)


@torch.library.custom_op("vae_kernels::embedding_word_dropout", mutates_args=())
def _embed(
    tokens_BT: torch.Tensor,
    weight_VE: torch.Tensor,
    rng: torch.Tensor,
    sample_id_B: torch.Tensor,
    rate: torch.Tensor,
    unk_id: int,
    keep_ids: Sequence[int],
    stream: int,
    backend: str,
) -> torch.Tensor:
    _check_range(tokens_BT, weight_VE.shape[0])
    noise = (rng, sample_id_B, rate, unk_id, tuple(keep_ids), stream)
    if resolve_backend(backend, weight_VE) == "triton":
        with on_device_of(weight_VE):
            return _triton().forward(tokens_BT, weight_VE, *noise)
    words_BT = _drop_words(tokens_BT, *noise)
    return weight_VE.index_select(0, words_BT.flatten()).view(*tokens_BT.shape, weight_VE.shape[1])


@_embed.register_fake
def _(tokens_BT: torch.Tensor, weight_VE: torch.Tensor, *_: Any) -> torch.Tensor:
    return weight_VE.new_empty(*tokens_BT.shape, weight_VE.shape[1])


@torch.library.custom_op("vae_kernels::embedding_word_dropout_backward", mutates_args=())
def _weight_gradient(
    grad_BTE: torch.Tensor,
    tokens_BT: torch.Tensor,
    rng: torch.Tensor,
    sample_id_B: torch.Tensor,
    rate: torch.Tensor,
    unk_id: int,
    keep_ids: Sequence[int],
    stream: int,
    vocab: int,
    backend: str,
) -> torch.Tensor:
    noise = (rng, sample_id_B, rate, unk_id, tuple(keep_ids), stream)
    if resolve_backend(backend, grad_BTE) == "triton":
        with on_device_of(grad_BTE):
            return _triton().backward(grad_BTE, tokens_BT, *noise, vocab)
    wide_BTE = grad_BTE.to(torch.promote_types(grad_BTE.dtype, torch.float32))
    # torch's own kernel adds a word's rows in their order, on one thread; -1: no word is padding.
    total_VE = torch.ops.aten.embedding_dense_backward(wide_BTE, _drop_words(tokens_BT, *noise), vocab, -1, False)
    return total_VE.to(grad_BTE.dtype)


@_weight_gradient.register_fake
def _(grad_BTE: torch.Tensor, *arguments: Any) -> torch.Tensor:
    vocab = arguments[-2]
    return grad_BTE.new_empty(vocab, grad_BTE.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    tokens_BT, weight_VE, rng, sample_id_B, rate, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(tokens_BT, rng, sample_id_B, rate)
    ctx.vocab = weight_VE.shape[0]


@first_order_only
def _backward(ctx: Any, grad_BTE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_VE = _weight_gradient(grad_BTE, *ctx.saved_tensors, *ctx.options, ctx.vocab, ctx.backend)
    return None, grad_VE, None, None, None, None, None, None, None


_embed.register_autograd(_backward, setup_context=_save)


def _drop_words(
    tokens_BT: torch.Tensor,
    rng: torch.Tensor,
    sample_id_B: torch.Tensor,
    rate: torch.Tensor,
    unk_id: int,
    keep_ids: Sequence[int],
    stream: int,
) -> torch.Tensor:
    """The tokens that are embedded, int64 [B, T]."""
    # On the CPU the rate can be looked at without a wait, and evaluation, at rate 0, is spared the noise.
    if rate.device.type == "cpu" and not bool(rate > 0.0):
        return tokens_BT
    position_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    replaced_BT = philox_uniform(rng, sample_id_B[:, None], position_T, stream=stream) < rate
    for kept in keep_ids:
        replaced_BT &= tokens_BT != kept
    return tokens_BT.masked_fill(replaced_BT, unk_id)


def _triton() -> Any:
    # Triton is imported only once its kernels are wanted.
    from vae_kernels import embedding_word_dropout_triton

    return embedding_word_dropout_triton


def _rate(rate: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """float32 scalar on the device; filled there, because copying a number would make the host wait."""
    if isinstance(rate, torch.Tensor):
        if rate.dim() != 0:
            raise ValueError(f"rate must be a number or a 0-d tensor, got shape {tuple(rate.shape)}")
        return rate.detach().to(device, torch.float32)
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate is {rate}; it is a probability and must be in [0, 1]")
    return torch.full((), rate, dtype=torch.float32, device=device)


def _check(tokens: torch.Tensor, weight: torch.Tensor, sample_id: torch.Tensor, rng: torch.Tensor) -> None:
    if tokens.dtype != torch.int64 or not weight.is_floating_point():
        raise TypeError(f"tokens must be int64 and weight floating point, got {tokens.dtype} and {weight.dtype}")
    if tokens.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"tokens must be [B, T] and weight [V, E], got {tuple(tokens.shape)}, {tuple(weight.shape)}")
    if sample_id.shape != tokens.shape[:1]:
        raise ValueError(f"sample_id must have shape ({tokens.shape[0]},), got {tuple(sample_id.shape)}")
    for name, tensor in (("tokens", tokens), ("rng", rng), ("sample_id", sample_id)):
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device} and weight on {weight.device}; move it there")


def _check_range(tokens_BT: torch.Tensor, vocab: int) -> None:
    if tokens_BT.device.type != "cpu" or tokens_BT.numel() == 0:
        return
    low, high = (int(bound) for bound in tokens_BT.aminmax())
    if low < 0 or high >= vocab:
        raise IndexError(f"tokens run from {low} to {high}; they must be in [0, {vocab}), the rows of weight")
