"""Torch backend of `linear_cross_entropy_rows.py`: a matrix product, then passes over its result, in place.

The passes are compiled by torch's own inductor: torch's operators would need five and wide copies. Backward may keep
the products of forward. Shapes: C rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable

import torch

from vae_kernels.compiled import compiled
from vae_kernels.linear_cross_entropy_options import Head, LossOptions, wide
from vae_kernels.linear_cross_entropy_rows import Deltas, RowTerms, Sums

# Large enough for few additions to the weight's gradient (each is a pass over [V, H]), small enough to keep between
# calls: fresh pages would cost as much as a pass.
WORKSPACE_BYTES = 2**26
# Below this many logits a pass is not worth compiling (seconds, once a process).
COMPILE_ELEMENTS = 2**20
# Of the sum of odds. Beyond it the factors that go with them, times a small upstream gradient, leave float32's range.
LARGEST_SUM = 2.0**60

# Of x and the targets' weights, widened at a time.
_WIDE_ELEMENTS = 2**19

_LOCAL = threading.local()


def can_keep(dtype: torch.dtype, options: LossOptions) -> bool:
    """Products serve every dtype and option."""
    return True


def row_pitch(vocab: int, dtype: torch.dtype) -> int:
    """Rows follow one another."""
    return vocab


def prepared(head: Head) -> Head:
    """Operands are ready as they are."""
    return head


def rows_at_once(head: Head, kept: bool) -> int:
    """How many rows' logits the workspace holds: equal shares of all rows.

    All of them, up to four times its size, where they take no more memory than the wide sum over chunks, [V, H], that
    a single chunk can do without.
    """
    row_bytes = head.vocab * head.x_NH.dtype.itemsize
    most = max(1, WORKSPACE_BYTES // row_bytes)
    no_more_than_sum = head.rows * row_bytes <= 4 * head.vocab * head.x_NH.shape[1]
    if no_more_than_sum and head.rows * row_bytes <= 4 * WORKSPACE_BYTES:
        return max(1, head.rows)
    chunks = max(1, -(-head.rows // most))
    return max(1, -(-head.rows // chunks))


def workspace(head: Head) -> torch.Tensor:
    """Memory for logits, [C, V]: this thread's, overwritten by its next call."""
    shape, dtype, device = (head.rows, head.vocab), head.x_NH.dtype, head.x_NH.device
    count = head.rows * head.vocab * dtype.itemsize
    if device.type != "cpu" or count > WORKSPACE_BYTES:
        return head.x_NH.new_empty(shape)
    if not hasattr(_LOCAL, "memory") or _LOCAL.memory.numel() < count:
        # A tensor made in inference mode could not be written outside of it later.
        with torch.inference_mode(mode=False):
            _LOCAL.memory = torch.empty(count, dtype=torch.uint8)
    return _LOCAL.memory[:count].view(dtype).view(shape)


def target_logits(head: Head) -> torch.Tensor:
    """Final logit of each row's target, wide [N], without the rounding of a half-precision product.

    Word 0 stands in for a target of another shard.
    """
    dtype, word_N = wide(head.x_NH.dtype), head.target_N.clamp(min=0)
    logit_N = head.x_NH.new_empty(head.rows, dtype=dtype)
    # Some rows at a time: the wide copies stay small.
    step = max(1, _WIDE_ELEMENTS // max(1, head.x_NH.shape[1]))
    for start in range(0, head.rows, step):
        rows = slice(start, start + step)
        chosen_CH = head.weight_VH.index_select(0, word_N[rows]).to(dtype)
        logit_N[rows] = (head.x_NH[rows].to(dtype) * chosen_CH).sum(-1)
    bias_N = None if head.bias_V is None else head.bias_V.index_select(0, word_N)
    return final_logits(logit_N, bias_N, head.options)


def final_logits(logits: torch.Tensor, bias: torch.Tensor | None, options: LossOptions) -> torch.Tensor:
    """Bias, scale and cap applied to x @ weight.T."""
    if bias is not None:
        logits = logits + bias
    if options.logit_scale != 1.0:
        logits = logits * options.logit_scale
    if options.softcap:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    return logits


def sweep(head: Head, reference_C: torch.Tensor, kept_CV: torch.Tensor | None) -> Sums:
    """See `linear_cross_entropy_rows.Backend`."""
    product_CV = workspace(head) if kept_CV is None else kept_CV
    torch.mm(head.x_NH, head.weight_VH.t(), out=product_CV)
    arguments = (product_CV, head.bias_V, head.target_N.int())
    sums = _passes(head, product_CV).sums(*arguments, reference_C)
    lost_C = ~(sums.rest <= LARGEST_SUM)
    if bool(lost_C.any()):
        # The target is so unlikely that the odds against it overflow: refer them to the likeliest word instead.
        likeliest_C = final_logits(product_CV.to(reference_C.dtype), head.bias_V, head.options).amax(-1)
        reference_C.copy_(torch.where(lost_C, likeliest_C, reference_C))
        sums = _passes(head, product_CV).sums(*arguments, reference_C)
    return sums


def complete(head: Head, terms: RowTerms, fill_C: torch.Tensor, kept_CV: torch.Tensor) -> None:
    """Products are complete."""


def deltas(
    head: Head, terms: RowTerms, how: Deltas, kept_CV: torch.Tensor | None, out_CV: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `linear_cross_entropy_rows.Backend`; the factor is applied."""
    out_CV = workspace(head) if out_CV is None else out_CV
    if kept_CV is None:
        torch.mm(head.x_NH, head.weight_VH.t(), out=out_CV)
    elif kept_CV is not out_CV:
        out_CV.copy_(kept_CV)
    _passes(head, out_CV).deltas(out_CV, head.bias_V, head.target_N.int(), *how)
    return out_CV, None


class _Passes:
    """The two passes over a matrix of products, compiled or not."""

    def __init__(self, options: LossOptions, compile_them: bool) -> None:
        self.options = options
        wrap = compiled if compile_them else lambda function: function
        self.sums: Callable[..., Sums] = wrap(self._sums)
        self.deltas: Callable[..., None] = wrap(self._deltas)

    def _sums(
        self,
        product_CV: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_C: torch.Tensor,
        reference_C: torch.Tensor,
    ) -> Sums:
        z_CV = final_logits(product_CV.to(reference_C.dtype), bias_V, self.options)
        odds_CV = torch.exp(z_CV - reference_C[:, None]).where(~_at(target_C, z_CV), 0.0)
        return Sums(odds_CV.sum(-1), z_CV.sum(-1) if self.options.label_smoothing else None)

    def _deltas(
        self,
        product_CV: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_C: torch.Tensor,
        lse_C: torch.Tensor,
        fill_C: torch.Tensor,
        shift_C: torch.Tensor,
        factor_C: torch.Tensor,
    ) -> None:
        z_CV = final_logits(product_CV.to(lse_C.dtype), bias_V, self.options)
        p_CV = torch.exp(z_CV - lse_C[:, None])
        if self.options.label_smoothing:
            p_CV = p_CV - shift_C[:, None]
        delta_CV = torch.where(_at(target_C, z_CV), fill_C[:, None], p_CV) * factor_C[:, None]
        if self.options.softcap:
            delta_CV = delta_CV * (1.0 - (z_CV / self.options.softcap).square())
        product_CV.copy_(delta_CV)


def _at(target_C: torch.Tensor, logits_CV: torch.Tensor) -> torch.Tensor:
    return torch.arange(logits_CV.shape[1], dtype=torch.int32, device=logits_CV.device) == target_C[:, None]


def _passes(head: Head, product_CV: torch.Tensor) -> _Passes:
    on_cpu = product_CV.device.type == "cpu" and product_CV.dtype != torch.float64
    # What the passes take from tensors must not make new ones: a z-loss may be annealed.
    options = dataclasses.replace(
        head.options, ignore_index=0, z_loss=0.0, label_smoothing=0.5 if head.options.label_smoothing else 0.0
    )
    return _cached_passes(options, on_cpu and product_CV.numel() >= COMPILE_ELEMENTS)


_cached_passes = functools.lru_cache(maxsize=64)(_Passes)
