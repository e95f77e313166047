"""The torch backend: rows in chunks whose logits stay in cache, softmax in float32, dW accumulated in float32.

Shapes: N tokens, H hidden, V vocabulary, C rows of a chunk. `g` is the gradient with respect to the logits
before logit_scale, bias and softcap are undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vae_kernels.linear_cross_entropy import LossOptions

# A chunk of float32 logits of about this size stays in the last-level cache of a server core.
_CHUNK_BYTES = 4 * 2**20
_MIN_CHUNK_ROWS = 64
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, options: LossOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """nll[N] and logsumexp[N], float32 (float64 for float64 x)."""
    nll, lse = (x.new_empty(len(target), dtype=_wide(x)) for _ in range(2))
    weight = weight.to(x.dtype)
    for rows in _chunks(x, weight):
        logits, _ = _logits(x[rows], weight, bias, options)
        lse[rows] = torch.logsumexp(logits, dim=-1)
        nll[rows] = _nll(logits, lse[rows], target[rows], options)
    return nll, lse


def backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    g_nll: torch.Tensor,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> Gradients:
    """Gradients of sum(g_nll * nll), logits recomputed chunk by chunk."""
    sums = _GradientSums(x, weight, bias, options, needs)
    for rows in _chunks(x, weight):
        logits, slope = _logits(x[rows], sums.weight, bias, options)
        sums.add(rows, logits, slope, lse[rows], target[rows], g_nll[rows])
    return sums.result()


def forward_with_gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor, Gradients]:
    """nll[N] and the gradients of sum(row_weight * nll), from logits computed once."""
    nll = x.new_empty(len(target), dtype=_wide(x))
    sums = _GradientSums(x, weight, bias, options, needs)
    for rows in _chunks(x, weight):
        logits, slope = _logits(x[rows], sums.weight, bias, options)
        lse = torch.logsumexp(logits, dim=-1)
        nll[rows] = _nll(logits, lse, target[rows], options)
        sums.add(rows, logits, slope, lse, target[rows], row_weight[rows])
    return nll, sums.result()


class _GradientSums:
    """Turns a chunk's logits into its share of dx, dW and db."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        options: LossOptions,
        needs: tuple[bool, ...],
    ) -> None:
        wide = _wide(x)
        self.x, self.options = x, options
        self.weight, self.weight_dtype = weight.to(x.dtype), weight.dtype
        self.bias_dtype = bias.dtype if bias is not None else wide
        self.dx = torch.empty_like(x) if needs[0] else None
        self.dw = torch.zeros(weight.shape, dtype=wide, device=x.device) if needs[1] else None
        self.db = torch.zeros(len(weight), dtype=wide, device=x.device) if bias is not None and needs[2] else None

    def add(
        self,
        rows: slice,
        logits: torch.Tensor,
        slope: torch.Tensor | None,
        lse: torch.Tensor,
        target: torch.Tensor,
        g_nll: torch.Tensor,
    ) -> None:
        """Overwrites `logits`."""
        options, vocab = self.options, logits.shape[1]
        real = target != options.ignore_index
        upstream = torch.where(real, g_nll.to(logits.dtype), 0.0)
        g = logits.sub_(lse[:, None]).exp_().mul_((upstream * (1.0 + 2.0 * options.z_loss * lse))[:, None])
        if options.label_smoothing:
            g.sub_((upstream * options.label_smoothing / vocab)[:, None])
        # The target's p - 1 is formed here, before any rounding to the dtype of the products.
        column = torch.where(real, target, 0)[:, None]
        g.scatter_add_(1, column, (-(1.0 - options.label_smoothing) * upstream)[:, None])
        if slope is not None:
            g.mul_(slope)
        if self.db is not None:
            self.db += g.sum(0)
        if options.logit_scale != 1.0:
            g.mul_(options.logit_scale)
        narrow = g.to(self.x.dtype)
        if self.dx is not None:
            torch.mm(narrow, self.weight, out=self.dx[rows])
        if self.dw is not None:
            _add_product(self.dw, narrow.t(), self.x[rows])

    def result(self) -> Gradients:
        return (
            self.dx,
            None if self.dw is None else self.dw.to(self.weight_dtype),
            None if self.db is None else self.db.to(self.bias_dtype),
        )


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(x: torch.Tensor, weight: torch.Tensor) -> Iterator[slice]:
    rows = max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // (4 * len(weight)))
    for start in range(0, len(x), rows):
        yield slice(start, min(start + rows, len(x)))


def _logits(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: LossOptions
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Wide logits [C, V], and the softcap's derivative where there is one."""
    logits = (x @ weight.t()).to(_wide(x))
    if options.logit_scale != 1.0:
        logits.mul_(options.logit_scale)
    if bias is not None:
        logits.add_(bias.to(logits.dtype))
    if options.softcap is None:
        return logits, None
    capped = torch.tanh(logits / options.softcap)
    return capped * options.softcap, 1.0 - capped**2


def _nll(logits: torch.Tensor, lse: torch.Tensor, target: torch.Tensor, options: LossOptions) -> torch.Tensor:
    real = target != options.ignore_index
    picked = logits.gather(1, torch.where(real, target, 0)[:, None])[:, 0]
    smoothing = options.label_smoothing
    nll = lse - (1.0 - smoothing) * picked + options.z_loss * lse**2
    if smoothing:
        nll = nll - smoothing * logits.mean(dim=-1)
    return torch.where(real, nll, 0.0)
