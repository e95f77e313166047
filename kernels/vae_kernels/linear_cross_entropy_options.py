"""What the two backends of `linear_cross_entropy.py` share: the options, and the loss from a row's sums."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Of (x, weight, bias); None where no gradient is needed.
Gradients = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class LossOptions:
    """See `linear_cross_entropy` for each. Raises ValueError for values outside their range."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if self.softcap is not None and not (self.softcap > 0.0 and math.isfinite(self.softcap)):
            raise ValueError(f"softcap is {self.softcap}; it must be positive and finite, or None")
        if not (math.isfinite(self.logit_scale) and math.isfinite(self.z_loss)):
            raise ValueError(f"logit_scale {self.logit_scale} and z_loss {self.z_loss} must be finite")


def row_loss(
    lse_N: torch.Tensor,
    target_logit_N: torch.Tensor,
    logit_mean_N: torch.Tensor | None,
    ignored_N: torch.Tensor,
    options: LossOptions,
) -> torch.Tensor:
    """nll [N]; zero for ignored rows. `logit_mean_N` is read only with label smoothing."""
    nll_N = lse_N - target_logit_N
    if options.label_smoothing:
        assert logit_mean_N is not None
        nll_N = nll_N + options.label_smoothing * (target_logit_N - logit_mean_N)
    if options.z_loss:
        nll_N = nll_N + options.z_loss * lse_N.square()
    return nll_N.masked_fill(ignored_N, 0.0)


def matmul_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b as float32 (float64 stays).

    Half precision is rounded on the way only where torch offers no wide result: on the CPU.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()
