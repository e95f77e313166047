"""Cross entropy of a linear projection, without ever holding the [N, V] float32 logits.

Shapes: N tokens, H hidden, V vocabulary, B sequences, C rows of a chunk.

    logits = softcap * tanh(s / softcap),  s = logit_scale * x W^T + b        (softcap None: logits = s)
    nll_n  = lse_n - (1 - a) logits[n, y_n] - a mean_v logits[n, v] + z_loss * lse_n^2,  a = label_smoothing
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vae_kernels.backend import resolve_backend
from vae_kernels.segment_sum import segment_sum

REDUCTIONS = ("none", "sequence", "sum", "mean")


@dataclass(frozen=True)
class LossOptions:
    """Everything about the loss that is no tensor."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    max_saved_bytes: int


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    weight_per_sequence: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "none",
    max_saved_bytes: int = 2**31,
    backend: str = "auto",
) -> Any:
    """Negative log-likelihood of `target` under softmax(x W^T + b), in nats.

    Args:
        x: [N, H]; its dtype is that of the matrix products.
        weight: [V, H], in x's dtype or float32; its gradient is accumulated in float32.
        target: int64[N], below V, or `ignore_index` (nll 0, no gradient).
        bias: [V].
        cu_seqlens: integer [B + 1], where each sequence begins in N; needed for `sequence`.
        weight_per_sequence: float [B]; then the result is (sum_b w_b nll_b, nll_b detached), and the gradients are
            formed in the forward pass, from logits computed once. It has no gradient itself.
        z_loss: adds z_loss * logsumexp^2 to each token.
        softcap: bounds the logits smoothly.
        reduction: none [N], sequence [B], sum, or mean over the tokens not ignored (0 if there are none).
        max_saved_bytes: bound on what a backend may keep for the backward pass besides its inputs.
        backend: auto, triton or torch.

    Returns:
        float32 (float64 for float64 x) losses of the reduction's shape; see `weight_per_sequence`.
    """
    _check(x, weight, target, cu_seqlens, weight_per_sequence, reduction)
    chosen = resolve_backend(backend, x)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale, max_saved_bytes)
    if weight_per_sequence is not None:
        lengths = cu_seqlens.diff()
        row_weight = weight_per_sequence.detach().float().repeat_interleave(lengths, output_size=len(target))
        weighted, nll = _WeightedSum.apply(x, weight, bias, target, row_weight, options, chosen)
        return weighted, segment_sum(nll, cu_seqlens)
    nll = _PerToken.apply(x, weight, bias, target, options, chosen)
    if reduction == "none":
        return nll
    if reduction == "sequence":
        return segment_sum(nll, cu_seqlens)
    if reduction == "sum":
        return nll.sum()
    return nll.sum() / (target != ignore_index).sum().clamp(min=1)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    weight_per_sequence: torch.Tensor | None,
    reduction: str,
) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or target.shape != x.shape[:1]:
        raise ValueError(
            f"expected x [N, H], weight [V, H], target [N], not {tuple(x.shape)}, {tuple(weight.shape)}, "
            f"{tuple(target.shape)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    if cu_seqlens is None and (reduction == "sequence" or weight_per_sequence is not None):
        raise ValueError("reduction='sequence' and weight_per_sequence need cu_seqlens")


def _implementation(backend: str) -> Any:
    if backend == "triton":
        from vae_kernels import linear_cross_entropy_triton

        return linear_cross_entropy_triton
    from vae_kernels import linear_cross_entropy_torch

    return linear_cross_entropy_torch


class _PerToken(torch.autograd.Function):
    """nll[N]; the backward pass recomputes the logits, so any upstream gradient is exact."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, target: Any, options: LossOptions, backend: str) -> Any:
        nll, lse = _implementation(backend).forward(x, weight, bias, target, options)
        ctx.save_for_backward(x, weight, bias, target, lse)
        ctx.settings = (options, backend)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        options, backend = ctx.settings
        x, weight, bias, target, lse = ctx.saved_tensors
        grads = _implementation(backend).backward(
            x, weight, bias, target, lse, g_nll.contiguous(), options, ctx.needs_input_grad[:3]
        )
        return (*grads, None, None, None)


class _WeightedSum(torch.autograd.Function):
    """(sum of row weight * nll, nll[N] detached), its gradients formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any, target: Any, row_weight: Any, options: LossOptions, backend: str
    ) -> Any:
        implementation = _implementation(backend)
        if any(ctx.needs_input_grad[:3]):
            nll, grads = implementation.forward_with_gradients(
                x, weight, bias, target, row_weight, options, ctx.needs_input_grad[:3]
            )
        else:
            nll, grads = implementation.forward(x, weight, bias, target, options)[0], (None, None, None)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(nll)
        return (nll * row_weight).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_sum: torch.Tensor, g_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [None if g is None else g * g_sum.to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, None, None, None, None)
