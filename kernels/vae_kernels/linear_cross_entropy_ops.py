"""`linear_cross_entropy.py` as operators of torch: opaque to compilers, with shapes and derivatives they can use.

An operator takes and returns plain tensors and numbers: options travel as `LossOptions.numbers`, and what is absent
comes back as an empty tensor. Shapes: N rows, K rows of which something is kept, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from vae_kernels import linear_cross_entropy_torch
from vae_kernels.autograd import first_order_only
from vae_kernels.backend import on_device_of
from vae_kernels.linear_cross_entropy_options import Head, LossOptions, wide
from vae_kernels.linear_cross_entropy_rows import (
    Backend,
    Gradients,
    RowTerms,
    gradients,
    rows_to_keep,
    score,
    score_and_gradients,
)

Tensor = torch.Tensor


@torch.library.custom_op("vae_kernels::linear_cross_entropy_rows", mutates_args=())
def rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: list[float],
    max_saved_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(nll [N]; the row terms [4, N]; what is kept of the first rows [K, V])."""
    with on_device_of(x):
        chosen = implementation(backend)
        head = chosen.prepared(Head.of(x, weight, bias, target, LossOptions.of(options)))
        kept_KV = kept_rows(x, weight, options, max_saved_bytes, backend)
        nll_N, terms = score(head, chosen, kept_KV if len(kept_KV) else None)
    return nll_N, torch.stack(terms), kept_KV


@rows.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    nll_N = x.new_empty(x.shape[0], dtype=wide(x.dtype))
    return nll_N, nll_N.new_empty(4, x.shape[0]), kept_rows(x, weight, *settings)


@torch.library.custom_op("vae_kernels::linear_cross_entropy_rows_backward", mutates_args=())
def rows_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    terms: Tensor,
    kept: Tensor,
    needs: list[bool],
    options: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias) for upstream gradients [N]."""
    with on_device_of(x):
        chosen, kept_KV = implementation(backend), kept if len(kept) else None
        head = chosen.prepared(Head.of(x, weight, bias, target, LossOptions.of(options)))
        found = gradients(head, chosen, RowTerms(*terms), grad, tuple(needs), weight.dtype, kept_KV)
    return returned_gradients(found, x, bias)


@rows_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    terms: Tensor,
    kept: Tensor,
    needs: list[bool],
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(x, weight, bias, needs)


@torch.library.custom_op("vae_kernels::linear_cross_entropy_weighted", mutates_args=())
def weighted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    needs: list[bool],
    options: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum_i row_weight_i nll_i; nll [N]; gradients of that sum for x, weight, bias)."""
    with on_device_of(x):
        chosen = implementation(backend)
        head = chosen.prepared(Head.of(x, weight, bias, target, LossOptions.of(options)))
        nll_N, found = score_and_gradients(head, chosen, row_weight, tuple(needs), weight.dtype)
    return (row_weight * nll_N).sum(), nll_N, *returned_gradients(found, x, bias)


@weighted.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    needs: list[bool],
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    nll_N = x.new_empty(x.shape[0], dtype=wide(x.dtype))
    return nll_N.new_empty(()), nll_N, *empty_gradients(x, weight, bias, needs)


def implementation(backend: str) -> Backend:
    """The backend's module: "torch" or "triton"."""
    if backend == "torch":
        return linear_cross_entropy_torch
    # Triton is imported only once its kernels are wanted.
    from vae_kernels import linear_cross_entropy_triton

    return linear_cross_entropy_triton


def kept_rows(x: Tensor, weight: Tensor, options: list[float], max_saved_bytes: int, backend: str) -> Tensor:
    """Memory for what forward keeps of the first K rows, [K, V]."""
    chosen, vocab = implementation(backend), weight.shape[0]
    count = rows_to_keep(x, vocab, LossOptions.of(options), max_saved_bytes, chosen)
    return x.new_empty_strided((count, vocab), (chosen.row_pitch(vocab, x.dtype), 1))


def returned_gradients(found: Gradients, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As an operator returns them: an empty tensor for None."""
    grad_x, grad_weight, grad_bias = found
    return (
        x.new_empty(0) if grad_x is None else grad_x,
        x.new_empty(0) if grad_weight is None else grad_weight,
        x.new_empty(0) if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def empty_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The same for tracing."""
    return (
        x.new_empty(x.shape) if needs[0] else x.new_empty(0),
        weight.new_empty(weight.shape) if needs[1] else x.new_empty(0),
        bias.new_empty(bias.shape) if needs[2] and bias is not None else x.new_empty(0),
    )


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, target, options, _, backend = inputs
    _, terms, kept = output
    ctx.save_for_backward(x, weight, bias, target, terms, kept)
    ctx.settings = options, backend
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(terms, kept)


@first_order_only
def _rows_derivative(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    needs = list(ctx.needs_input_grad[:3])
    found = rows_backward(grad.contiguous(), *ctx.saved_tensors, needs, *ctx.settings)
    return (*(part if needed else None for part, needed in zip(found, needs, strict=True)), *(None,) * 4)


def _weighted_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, nll, *found = output
    ctx.save_for_backward(*found)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(nll, *found)


@first_order_only
def _weighted_derivative(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    # The usual case, and a pass over [V, H] saved where looking costs no wait (subclasses stand in for it in tracing).
    one = type(grad) is torch.Tensor and grad.device.type == "cpu" and float(grad) == 1.0
    scaled = (
        (part if one else part * grad.to(part.dtype)) if needed else None
        for part, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    )
    return (*scaled, *(None,) * 5)


rows.register_autograd(_rows_derivative, setup_context=_rows_context)
weighted.register_autograd(_weighted_derivative, setup_context=_weighted_context)
