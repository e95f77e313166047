"""Losses and gradients of a linear softmax layer, chunk by chunk of rows: what both backends share.

Shapes: N rows, C rows at a time, K rows kept from forward to backward, H hidden, V vocabulary. With final logits z and
target y of a row, and a reference r that is known before the logits are:

    rest = sum_{j /= y} exp(z_j - r)          for r = z_y the odds against the target: nll = log(1 + rest)
    dnll/dz_j = p_j - [j = y]                 p_y - 1 = -rest / (1 + rest), never cancelled

Because r is known beforehand, one sweep sums with no running maximum. ../README.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from vae_kernels.linear_cross_entropy_options import Head, LossOptions, matmul_wide, wide

# Of (x, weight, bias); None where no gradient is needed.
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
Needs = tuple[bool, ...]

# Rows of the weight's gradient that a half-precision product on the CPU forms at a time, in bytes: what is rounded
# and then added stays in cache.
_SLICE_BYTES = 2**22


class Sums(NamedTuple):
    """Of a sweep over the rows' logits, wide [C]: odds against the target; final logits, with label smoothing only."""

    rest: torch.Tensor
    logits: torch.Tensor | None


class RowTerms(NamedTuple):
    """What forward knows of each row, wide [N] each.

    Attributes:
        lse: logsumexp of the final logits.
        miss: 1 - p(target), not cancelled.
        target_logit: final.
        reference: of what was kept; +inf for ignored rows.
    """

    lse: torch.Tensor
    miss: torch.Tensor
    target_logit: torch.Tensor
    reference: torch.Tensor

    def rows(self, start: int, stop: int) -> RowTerms:
        """The terms of rows [start, stop)."""
        return RowTerms(*(term[start:stop] for term in self))


class Deltas(NamedTuple):
    """How the gradient of the logits is written; wide [C] each.

        delta_j = factor slope_j (exp(z_j - lse) - shift)      slope_j = 1 - (z_j / softcap)^2, or 1
        delta_y = factor slope_y fill

    Attributes:
        lse: +inf for ignored rows.
        fill: p_y - shift - (1 - label_smoothing) / z_slope with z_slope = 1 + 2 z_loss lse.
        shift: label_smoothing / total vocabulary / z_slope.
        factor: upstream gradient * z_slope * logit_scale; 0 for ignored rows.
    """

    lse: torch.Tensor
    fill: torch.Tensor
    shift: torch.Tensor
    factor: torch.Tensor


class Backend(Protocol):
    """What a backend brings."""

    def can_keep(self, dtype: torch.dtype, options: LossOptions) -> bool:
        """Whether forward can keep something from which backward need not form the logits again."""

    def row_pitch(self, vocab: int, dtype: torch.dtype) -> int:
        """Elements from row to row of what is kept."""

    def prepared(self, head: Head) -> Head:
        """The operands as the backend wants them; called once an operator."""

    def rows_at_once(self, head: Head, kept: bool) -> int:
        """How many rows are worked on together, at least 1; `kept`: of those of which something was kept."""

    def workspace(self, head: Head) -> torch.Tensor:
        """[C, V] for all rows of `head`, at most `rows_at_once(head, kept=False)`; overwritten by the next use."""

    def target_logits(self, head: Head) -> torch.Tensor:
        """Final logit of each row's target, wide [N]."""

    def sweep(self, head: Head, reference_C: torch.Tensor, kept_CV: torch.Tensor | None) -> Sums:
        """Sum over the logits, and fill `kept_CV` if there is one.

        reference_C: +inf gives sums of 0. Replaced, in place, by the largest logit in rows whose sum would overflow.
        """

    def complete(self, head: Head, terms: RowTerms, fill_C: torch.Tensor, kept_CV: torch.Tensor) -> None:
        """Called once the terms of kept rows are known; `fill_C` as in `Deltas`."""

    def deltas(
        self, head: Head, terms: RowTerms, how: Deltas, kept_CV: torch.Tensor | None, out_CV: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(gradient of x @ weight.T up to a factor per row [C, V]; that factor [C], None for 1).

        kept_CV: of these rows, if forward kept it; is not changed unless it is `out_CV` too.
        out_CV: where to write; None only for what was kept, where the backend may answer with it.
        """


def rows_to_keep(x_NH: torch.Tensor, vocab: int, options: LossOptions, max_saved_bytes: int, backend: Backend) -> int:
    """How many rows forward keeps something of: all, or as many as fit."""
    if not backend.can_keep(x_NH.dtype, options):
        return 0
    # Symbolic sizes forbid min().
    rows = x_NH.shape[0]
    fitting = max_saved_bytes // (backend.row_pitch(vocab, x_NH.dtype) * x_NH.dtype.itemsize)
    return rows if rows <= fitting else fitting


def score(head: Head, backend: Backend, kept_KV: torch.Tensor | None = None) -> tuple[torch.Tensor, RowTerms]:
    """(loss [N], terms); something of the first K rows goes to `kept_KV`."""
    target_logit_N = backend.target_logits(head)
    reference_N = target_logit_N.masked_fill(head.ignored_N, float("inf"))
    rest_N, logit_sum_N = sweep_rows(head, backend, reference_N, kept_KV)
    nll_N, terms = _losses(head, target_logit_N, reference_N, rest_N, logit_sum_N)
    complete_kept(head, backend, terms, kept_KV)
    return nll_N, terms


def sweep_rows(
    head: Head, backend: Backend, reference_N: torch.Tensor, kept_KV: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `Sums` of all rows, wide [N] each; `reference_N` may change, see `Backend.sweep`."""
    rest_N, logit_sum_N = torch.empty_like(reference_N), torch.zeros_like(reference_N)
    for start, stop, kept_CV in _chunks(head, backend, kept_KV):
        sums = backend.sweep(head.part(start, stop), reference_N[start:stop], kept_CV)
        rest_N[start:stop] = sums.rest
        if sums.logits is not None:
            logit_sum_N[start:stop] = sums.logits
    return rest_N, logit_sum_N


def complete_kept(head: Head, backend: Backend, terms: RowTerms, kept_KV: torch.Tensor | None) -> None:
    """Give the backend the terms of the rows that were kept."""
    if kept_KV is not None:
        part, own = head.part(0, len(kept_KV)), terms.rows(0, len(kept_KV))
        backend.complete(part, own, _fill(part, own)[0], kept_KV)


def gradients(
    head: Head,
    backend: Backend,
    terms: RowTerms,
    grad_N: torch.Tensor,
    needs: Needs,
    weight_dtype: torch.dtype,
    kept_KV: torch.Tensor | None = None,
) -> Gradients:
    """Gradients for any upstream gradient of each row's loss."""
    sums = _Gradients(head, needs, weight_dtype)
    for start, stop, kept_CV in _chunks(head, backend, kept_KV):
        part, own = head.part(start, stop), terms.rows(start, stop)
        how, peak = _how(part, own, grad_N[start:stop])
        delta_CV, factor_C = backend.deltas(
            part, own, how, kept_CV, None if kept_CV is not None else backend.workspace(part)
        )
        sums.add(start, part, delta_CV, factor_C, peak)
    return sums.result()


def score_and_gradients(
    head: Head, backend: Backend, grad_N: torch.Tensor, needs: Needs, weight_dtype: torch.dtype
) -> tuple[torch.Tensor, Gradients]:
    """(loss [N], gradients) for upstream gradients known beforehand: nothing is kept."""
    sums, nll_N = _Gradients(head, needs, weight_dtype), grad_N.new_empty(head.rows)
    step = backend.rows_at_once(head, kept=False)
    for start in range(0, head.rows, step):
        part = head.part(start, min(start + step, head.rows))
        buffer_CV = backend.workspace(part)
        kept_CV = buffer_CV if backend.can_keep(head.x_NH.dtype, head.options) else None
        nll_N[start : start + part.rows], terms = score(part, backend, kept_CV)
        how, peak = _how(part, terms, grad_N[start : start + part.rows])
        delta_CV, factor_C = backend.deltas(part, terms, how, kept_CV, buffer_CV)
        sums.add(start, part, delta_CV, factor_C, peak)
    return nll_N, sums.result()


def _chunks(
    head: Head, backend: Backend, kept_KV: torch.Tensor | None
) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """(start, stop, memory of kept rows or None): the kept rows, then the others, as many at a time as they may."""
    keep = 0 if kept_KV is None else kept_KV.shape[0]
    for first, last, kept in ((0, keep, True), (keep, head.rows, False)):
        step = backend.rows_at_once(head, kept)
        for start in range(first, last, step):
            stop = min(start + step, last)
            yield start, stop, kept_KV[start:stop] if kept and kept_KV is not None else None


def _losses(
    head: Head,
    target_logit_N: torch.Tensor,
    reference_N: torch.Tensor,
    rest_N: torch.Tensor,
    logit_sum_N: torch.Tensor,
) -> tuple[torch.Tensor, RowTerms]:
    own_N = torch.exp(target_logit_N - reference_N)
    # log1p keeps the digits of a sure target. Rows that had to change their reference have a far one: from there lse is
    # the exact end, and the loss the rounded one.
    near_N, log_total_N = reference_N == target_logit_N, torch.log(own_N + rest_N)
    lse_N = torch.where(near_N, target_logit_N + torch.log1p(rest_N), reference_N + log_total_N)
    nll_N = torch.where(near_N, torch.log1p(rest_N), lse_N - target_logit_N).masked_fill(head.ignored_N, 0.0)
    lse_N = torch.where(head.ignored_N, target_logit_N, lse_N)
    miss_N = (rest_N / (own_N + rest_N)).masked_fill(head.ignored_N, 0.0)
    terms = RowTerms(lse_N, miss_N, target_logit_N, reference_N)
    return regularised(head, nll_N, terms, logit_sum_N), terms


def regularised(head: Head, nll_N: torch.Tensor, terms: RowTerms, logit_sum_N: torch.Tensor) -> torch.Tensor:
    """-log p(target) with label smoothing and z-loss; 0 for ignored rows."""
    options = head.options
    if options.label_smoothing:
        nll_N = nll_N + options.label_smoothing * (terms.target_logit - logit_sum_N / head.total_vocab)
    if options.z_loss:
        nll_N = nll_N + options.z_loss * terms.lse.square()
    return nll_N.masked_fill(head.ignored_N, 0.0)


def _fill(head: Head, terms: RowTerms) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(fill, shift, z_slope) of `Deltas`."""
    options = head.options
    z_slope_C = 1.0 + 2.0 * options.z_loss * terms.lse
    # It divides, and a negative z-loss can bring it to zero.
    z_slope_C = torch.where(z_slope_C.abs() < 1e-6, 1e-6, z_slope_C)
    shift_C = options.label_smoothing / head.total_vocab / z_slope_C
    # p_y - (1 - a) / z_slope without the cancellation: p_y = 1 - miss.
    fill_C = (z_slope_C - 1.0 + options.label_smoothing) / z_slope_C - terms.miss - shift_C
    return fill_C, shift_C, z_slope_C


def _how(head: Head, terms: RowTerms, grad_C: torch.Tensor) -> tuple[Deltas, torch.Tensor | None]:
    """How the gradients are written, and by what they must still be multiplied (a scalar; None for 1)."""
    fill_C, shift_C, z_slope_C = _fill(head, terms)
    factor_C = (grad_C * z_slope_C * head.options.logit_scale).masked_fill(head.ignored_N, 0.0)
    peak = None
    if head.x_NH.dtype == torch.float16:
        # float16 ends early below, too: small upstream gradients are brought to at most 1 and back.
        peak = factor_C.abs().amax().clamp(min=1e-30) if head.rows else factor_C.new_ones(())
        factor_C = factor_C / peak
    lse_C = terms.lse.masked_fill(head.ignored_N, float("inf"))
    return Deltas(lse_C, fill_C, shift_C, factor_C), peak


class _Gradients:
    """Sums the gradients over the chunks of rows."""

    def __init__(self, head: Head, needs: Needs, weight_dtype: torch.dtype) -> None:
        self.head, self.needs, self.weight_dtype = head, needs, weight_dtype
        self.wide = wide(head.x_NH.dtype)
        self.on_cpu = head.x_NH.device.type == "cpu"
        self.grad_x_NH = torch.empty_like(head.x_NH) if needs[0] else None
        self.grad_weight_VH: torch.Tensor | None = None
        self.grad_bias_V = head.weight_VH.new_zeros(head.vocab, dtype=self.wide) if needs[2] else None

    def add(
        self,
        start: int,
        head: Head,
        delta_CV: torch.Tensor,
        factor_C: torch.Tensor | None,
        peak: torch.Tensor | None,
    ) -> None:
        """Add the rows of `head`, which begin at `start`; their gradients are delta * factor * peak."""
        if self.grad_x_NH is not None:
            rows = self.grad_x_NH[start : start + head.rows]
            if factor_C is None and peak is None:
                torch.mm(delta_CV, head.weight_VH, out=rows)
            else:
                grad_x_CH = matmul_wide(delta_CV, head.weight_VH)
                rows.copy_(_times(_times(grad_x_CH, None if factor_C is None else factor_C[:, None]), peak))
        if self.needs[1]:
            x_CH = head.x_NH if factor_C is None else (head.x_NH * factor_C[:, None]).to(head.x_NH.dtype)
            self._add_weight(x_CH, delta_CV, peak, only=head.rows == self.head.rows)
        if self.grad_bias_V is not None:
            ones_1C = (torch.ones_like(delta_CV[:, 0]) if factor_C is None else factor_C.to(delta_CV.dtype))[None]
            self.grad_bias_V += _times(matmul_wide(ones_1C, delta_CV)[0], peak)

    def result(self) -> Gradients:
        """Of (x, weight, bias): x's and the weight's in their parameter's dtype, the bias's wide."""
        weight_VH = self.grad_weight_VH
        if weight_VH is None and self.needs[1]:
            weight_VH = self.head.weight_VH.new_zeros(self.head.weight_VH.shape)
        return self.grad_x_NH, None if weight_VH is None else weight_VH.to(self.weight_dtype), self.grad_bias_V

    def _add_weight(self, x_CH: torch.Tensor, delta_CV: torch.Tensor, peak: torch.Tensor | None, only: bool) -> None:
        dtype = x_CH.dtype
        # Of all rows, half precision will do, too: the product sums wide inside and is rounded once.
        final = dtype == self.wide or (only and peak is None and dtype == self.weight_dtype)
        if final and self.grad_weight_VH is None:
            self.grad_weight_VH = delta_CV.t() @ x_CH
        elif self.grad_weight_VH is not None and dtype == self.wide:
            self.grad_weight_VH.addmm_(delta_CV.t(), x_CH)
        else:
            self._add_slices(x_CH, delta_CV, peak)

    def _add_slices(self, x_CH: torch.Tensor, delta_CV: torch.Tensor, peak: torch.Tensor | None) -> None:
        """Add in wide precision: a half-precision sum over chunks would lose what a long batch adds last."""
        first_chunk = self.grad_weight_VH is None
        if self.grad_weight_VH is None:
            self.grad_weight_VH = self.head.weight_VH.new_empty(self.head.weight_VH.shape, dtype=self.wide)
        vocab = self.head.vocab
        step = max(1, _SLICE_BYTES // (x_CH.shape[1] * x_CH.dtype.itemsize)) if self.on_cpu else vocab
        for start in range(0, vocab, step):
            delta_SC = delta_CV[:, start : start + step].t()
            # The CPU has no wide result to offer, and adding narrow to wide needs no copy.
            part_SH = _times(delta_SC @ x_CH if self.on_cpu else matmul_wide(delta_SC, x_CH), peak)
            rows = self.grad_weight_VH[start : start + step]
            rows.copy_(part_SH) if first_chunk else rows.add_(part_SH)


def _times(tensor: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return tensor if factor is None else tensor * factor
