"""Torch backend of `linear_cross_entropy.py`: chunks of rows, each chunk's logits formed once per sweep.

Shapes: N rows, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch

from vae_kernels.linear_cross_entropy_options import Gradients, LossOptions, matmul_wide, row_loss

# Float32 logits of one chunk. Each chunk adds a whole [V, H] to the weight gradient, so few large chunks
# cost less than many that fit the cache.
CHUNK_BYTES = 2**26


def nll(
    x_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    options: LossOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [N], log-sum-exp [N])."""
    sweep = _Sweep(x_NH, weight_VH, bias_V, target_N, options, (False, False, False))
    for start in sweep.starts():
        sweep.score(start)
    return sweep.nll_N, sweep.lse_N


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
    sweep = _Sweep(x_NH, weight_VH, bias_V, target_N, options, needs)
    for start in sweep.starts():
        sweep.differentiate(start, sweep.logits(start), lse_N, grad_N)
    return sweep.gradients()


def nll_and_gradients(
    x_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    grad_N: torch.Tensor,
    options: LossOptions,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor, Gradients]:
    """(loss [N], gradients) in one sweep, for upstream gradients known beforehand."""
    sweep = _Sweep(x_NH, weight_VH, bias_V, target_N, options, needs)
    for start in sweep.starts():
        logits_CV = sweep.score(start)
        sweep.differentiate(start, logits_CV, sweep.lse_N, grad_N)
    return sweep.nll_N, sweep.gradients()


def rows_per_chunk(vocab: int, item_bytes: int) -> int:
    """How many rows' logits fit into CHUNK_BYTES, at least one."""
    return max(1, CHUNK_BYTES // (vocab * item_bytes))


class _Sweep:
    """One pass over the rows; holds what the chunks add up."""

    def __init__(
        self,
        x_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        options: LossOptions,
        needs: tuple[bool, ...],
    ) -> None:
        self.x_NH, self.weight_VH, self.bias_V, self.options = x_NH, weight_VH, bias_V, options
        self.wide = torch.float64 if x_NH.dtype == torch.float64 else torch.float32
        self.ignored_N = target_N == options.ignore_index
        self.target_N = target_N.masked_fill(self.ignored_N, 0)
        _check_targets(self.target_N, weight_VH.shape[0])
        self.rows = rows_per_chunk(weight_VH.shape[0], self.wide.itemsize)
        self.nll_N = x_NH.new_empty(x_NH.shape[0], dtype=self.wide)
        self.lse_N = torch.empty_like(self.nll_N)
        self.grad_x_NH = torch.empty_like(x_NH) if needs[0] else None
        # Wide accumulators: a half-precision sum over chunks loses what a long batch adds last.
        self.grad_weight_VH = torch.zeros_like(weight_VH, dtype=self.wide) if needs[1] else None
        self.grad_bias_V = weight_VH.new_zeros(weight_VH.shape[0], dtype=self.wide) if needs[2] else None

    def starts(self) -> range:
        return range(0, self.x_NH.shape[0], self.rows)

    def logits(self, start: int) -> torch.Tensor:
        """Final logits of the chunk, wide [C, V]."""
        logits_CV = matmul_wide(self.x_NH[start : start + self.rows], self.weight_VH.t())
        if self.bias_V is not None:
            logits_CV += self.bias_V.to(self.wide)
        if self.options.logit_scale != 1.0:
            logits_CV *= self.options.logit_scale
        if self.options.softcap is not None:
            logits_CV.div_(self.options.softcap).tanh_().mul_(self.options.softcap)
        return logits_CV

    def score(self, start: int) -> torch.Tensor:
        """Fill the chunk's rows of nll and lse; return its logits."""
        logits_CV = self.logits(start)
        rows = slice(start, start + self.rows)
        lse_C = torch.logsumexp(logits_CV, dim=-1)
        target_logit_C = logits_CV.gather(1, self.target_N[rows, None])[:, 0]
        mean_C = logits_CV.mean(dim=-1) if self.options.label_smoothing else None
        self.lse_N[rows] = lse_C
        self.nll_N[rows] = row_loss(lse_C, target_logit_C, mean_C, self.ignored_N[rows], self.options)
        return logits_CV

    def differentiate(self, start: int, logits_CV: torch.Tensor, lse_N: torch.Tensor, grad_N: torch.Tensor) -> None:
        """Add the chunk's gradients; its logits are overwritten."""
        rows = slice(start, start + self.rows)
        delta_CV = self._logit_gradient(logits_CV, rows, lse_N[rows], grad_N[rows])
        if self.grad_bias_V is not None:
            self.grad_bias_V += delta_CV.sum(0)
        delta_CV = delta_CV.to(self.x_NH.dtype)
        if self.grad_x_NH is not None:
            self.grad_x_NH[rows] = delta_CV @ self.weight_VH
        if self.grad_weight_VH is not None and delta_CV.dtype == self.wide:
            self.grad_weight_VH.addmm_(delta_CV.t(), self.x_NH[rows])
        elif self.grad_weight_VH is not None:
            self.grad_weight_VH += matmul_wide(delta_CV.t(), self.x_NH[rows])

    def gradients(self) -> Gradients:
        """Of (x, weight, bias), each in its parameter's dtype."""
        weight, bias = self.grad_weight_VH, self.grad_bias_V
        return (
            self.grad_x_NH,
            None if weight is None else weight.to(self.weight_VH.dtype),
            None if bias is None or self.bias_V is None else bias.to(self.bias_V.dtype),
        )

    def _logit_gradient(
        self, logits_CV: torch.Tensor, rows: slice, lse_C: torch.Tensor, grad_C: torch.Tensor
    ) -> torch.Tensor:
        """Gradient of x @ weight.T + bias, wide [C, V], formed in place of the logits."""
        options, vocab = self.options, self.weight_VH.shape[0]
        grad_C1 = grad_C.to(self.wide).masked_fill(self.ignored_N[rows], 0.0)[:, None] * options.logit_scale
        slope_CV = None if options.softcap is None else 1.0 - (logits_CV / options.softcap).square_()
        delta_CV = logits_CV.sub_(lse_C[:, None]).exp_()
        if options.z_loss:
            delta_CV *= 1.0 + 2.0 * options.z_loss * lse_C[:, None]
        if options.label_smoothing:
            delta_CV -= options.label_smoothing / vocab
        # The target's p - 1 is formed before anything is rounded: in bfloat16 it would be lost for a sure
        # target.
        correction = torch.full_like(lse_C, options.label_smoothing - 1.0)[:, None]
        delta_CV.scatter_add_(1, self.target_N[rows, None], correction)
        if slope_CV is not None:
            delta_CV *= slope_CV
        delta_CV *= grad_C1
        return delta_CV.masked_fill_(self.ignored_N[rows, None], 0.0)


def _check_targets(target_N: torch.Tensor, vocab: int) -> None:
    if target_N.device.type != "cpu" or target_N.numel() == 0:
        return
    low, high = (int(bound) for bound in target_N.aminmax())
    if low < 0 or high >= vocab:
        raise IndexError(f"targets run from {low} to {high}; they must be in [0, {vocab}) or ignore_index")
