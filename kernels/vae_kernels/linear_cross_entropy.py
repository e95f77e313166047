"""Negative log-likelihood of a linear softmax layer without its [N, V] logits.

Shapes: N rows (tokens, packed over sequences), H hidden, V vocabulary, B sequences. Everything is in nats.

The logits of a row are z = cap(logit_scale * (x @ weight.T + bias)), cap(z) = softcap * tanh(z / softcap) or
z; its loss is, with p = softmax(z), a = label_smoothing and lse = logsumexp(z),

    nll = (1 - a) (-log p[target]) + a mean_j(-log p[j]) + z_loss * lse^2.

Sources: chunked heads and gradients formed in forward are common practice (for example Wijmans et al., "Cut
your losses in large-vocabulary language models", 2024, section 4); label smoothing: Szegedy et al. (2016),
section 7; z-loss: Chowdhery et al., "PaLM" (2022), section 5.
"""

from __future__ import annotations

import torch

from vae_kernels import linear_cross_entropy_ops as ops
from vae_kernels.backend import resolve_backend
from vae_kernels.linear_cross_entropy_options import LossOptions, wide
from vae_kernels.segment_sum import check_offsets, segment_ids, segment_sum

REDUCTIONS = ("none", "sequence", "sum", "mean")


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row, each sequence or the batch, float32 (float64 for float64 inputs), in nats.

    Without `weight_per_sequence`, backward takes any upstream gradient per row; forward keeps for it the logits or
    odds of as many rows as `max_saved_bytes` holds, and backward forms those of the others again. With it, the
    gradients are formed in forward, from the logits that give the loss, and backward only scales them, so nothing of
    size N * V is kept and the weight is not read after forward. Second derivatives are refused.

    Args:
        x: [N, H], float16, bfloat16, float32 or float64.
        weight: [V, H]; used in x's dtype (under autocast in the dtype that `F.linear` would use). Its gradient comes in
            its own dtype, summed wide; on the CPU the half-precision product of each chunk of rows is rounded once.
        target: int64 [N], in [0, V) or ignore_index.
        bias: [V], any floating dtype.
        cu_seqlens: int32 or int64 [B + 1], offsets of the sequences in the rows: from 0 to N.
        weight_per_sequence: floating point [B], needs cu_seqlens; receives no gradient.
        ignore_index: rows with this target have loss 0 and no gradient.
        label_smoothing: in [0, 1).
        z_loss: coefficient of lse^2.
        softcap: positive, or None for no cap.
        logit_scale: factor on the logits, before the cap.
        reduction: "none" -> [N]; "sequence" -> [B], sums; "sum" -> scalar; "mean" -> scalar, over the rows
            that are not ignored (0 when all are). With weight_per_sequence it must be "none" or "sequence".
        max_saved_bytes: bound on what forward keeps for backward: V numbers a row in x's dtype.
        backend: "auto", "triton" or "torch".

    Returns:
        The reduced loss; with weight_per_sequence the pair (sum_b weight_b * nll_b, a differentiable scalar;
        nll [B], detached).

    Raises:
        TypeError, ValueError: dtypes, shapes or options that do not fit.
        IndexError: a target outside the vocabulary (found on the CPU only; on a GPU it is undefined, as in
            torch).
        RuntimeError: backend="triton" where Triton cannot run.
    """
    options = LossOptions.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    x = in_autocast_dtype(x)
    check_head(x, weight, target, bias, max_saved_bytes)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, x.shape[0])
    elif reduction == "sequence" or weight_per_sequence is not None:
        raise ValueError("reduction='sequence' and weight_per_sequence need cu_seqlens")
    operands, numbers = (x, weight, bias, target), options.numbers()
    chosen = resolve_backend(backend, x)
    # The sums must run in the dtypes chosen here whatever autocast would make of them.
    with torch.autocast(x.device.type, enabled=False):
        if weight_per_sequence is not None:
            assert cu_seqlens is not None
            if reduction not in ("none", "sequence"):
                raise ValueError(f"weight_per_sequence fixes the reduction; reduction={reduction!r} does not fit")
            return _weighted(operands, cu_seqlens, weight_per_sequence, numbers, chosen)
        saved = max_saved_bytes if any(map(needs_gradient, operands)) else 0
        nll_N = ops.rows(*operands, numbers, saved, chosen)[0]
        if reduction == "sequence":
            assert cu_seqlens is not None
            return segment_sum(nll_N, cu_seqlens)
        if reduction == "none":
            return nll_N
        total = nll_N.sum()
        return total if reduction == "sum" else total / (target != ignore_index).sum().clamp(min=1)


def _weighted(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor],
    cu_seqlens: torch.Tensor,
    weight_per_sequence: torch.Tensor,
    numbers: list[float],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, bias, _ = operands
    if weight_per_sequence.shape != (cu_seqlens.shape[0] - 1,):
        raise ValueError(
            f"weight_per_sequence must have shape ({cu_seqlens.shape[0] - 1},) to go with cu_seqlens, "
            f"got {tuple(weight_per_sequence.shape)}"
        )
    weight_B = weight_per_sequence.detach().to(wide(x.dtype))
    needs = [needs_gradient(tensor) for tensor in (x, weight, bias)]
    row_weight_N = weight_B.index_select(0, segment_ids(cu_seqlens, x.shape[0]))
    if any(needs):
        total, nll_N, *_ = ops.weighted(*operands, row_weight_N, needs, numbers, backend)
    else:
        nll_N = ops.rows(*operands, numbers, 0, backend)[0]
        total = (row_weight_N * nll_N).sum()
    return total, segment_sum(nll_N, cu_seqlens)


def needs_gradient(tensor: torch.Tensor | None) -> bool:
    """Whether autograd would ask for this tensor's gradient."""
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def in_autocast_dtype(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that autocast, if it is on, would give to `F.linear`."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def check_head(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    max_saved_bytes: int,
) -> None:
    """Raise TypeError or ValueError where dtypes or shapes do not fit."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [N, H] and weight [V, H], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if target.shape != x.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{x.shape[0]}], got {target.dtype} {tuple(target.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows: the vocabulary is empty")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if max_saved_bytes < 0:
        raise ValueError(f"max_saved_bytes is {max_saved_bytes}; it must not be negative")
