"""What the parts of `linear_cross_entropy.py` share: the options, the operands, wide matrix products."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossOptions:
    """See `linear_cross_entropy` for each; a softcap of 0 is none.

    Raises ValueError for values outside their range.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        # Comparisons, not math.isfinite: a compiler that traces symbolic numbers follows them.
        if not 0.0 <= self.softcap < math.inf:
            raise ValueError(f"softcap is {self.softcap}; it must be positive and finite, or None")
        if not (-math.inf < self.logit_scale < math.inf and -math.inf < self.z_loss < math.inf):
            raise ValueError(f"logit_scale {self.logit_scale} and z_loss {self.z_loss} must be finite")

    @staticmethod
    def checked(
        ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, logit_scale: float
    ) -> LossOptions:
        """From a user's arguments."""
        if softcap is not None and not softcap > 0.0:
            raise ValueError(f"softcap is {softcap}; it must be positive and finite, or None")
        return LossOptions(
            ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0), float(logit_scale)
        )

    def numbers(self) -> list[float]:
        """As an operator takes them."""
        return [float(number) for number in dataclasses.astuple(self)]

    @staticmethod
    def of(numbers: Sequence[float]) -> LossOptions:
        """From `numbers()`; an ignore_index is exact in float64."""
        return LossOptions(int(numbers[0]), *numbers[1:])


@dataclass(frozen=True)
class Head:
    """The operands of the layer, ready for the matrix products.

    Attributes:
        x_NH, weight_VH: one dtype, that of the products; x contiguous.
        bias_V: wide (float32, or float64 in float64), or None.
        target_N: int64, 0 where the row is ignored, -1 where the target is not among these words (of a shard).
        ignored_N: bool.
        total_vocab: words of all shards.
    """

    x_NH: torch.Tensor
    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    target_N: torch.Tensor
    ignored_N: torch.Tensor
    options: LossOptions
    total_vocab: int

    @staticmethod
    def of(
        x_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        options: LossOptions,
        total_vocab: int | None = None,
    ) -> Head:
        """Cast the parameters and set the ignored rows apart.

        total_vocab: words of all shards, where `weight_VH` is one; targets are numbers among them.

        Raises:
            IndexError: a target outside the vocabulary (looked at on the CPU only, where it costs no wait).
        """
        ignored_N = target_N == options.ignore_index
        total_vocab = weight_VH.shape[0] if total_vocab is None else total_vocab
        _check_targets(target_N, ignored_N, total_vocab)
        return Head(
            x_NH.contiguous(),
            weight_VH.to(x_NH.dtype),
            None if bias_V is None else bias_V.to(wide(x_NH.dtype)),
            target_N.masked_fill(ignored_N, 0),
            ignored_N,
            options,
            total_vocab,
        )

    @property
    def rows(self) -> int:
        """N."""
        return self.x_NH.shape[0]

    @property
    def vocab(self) -> int:
        """V."""
        return self.weight_VH.shape[0]

    def part(self, start: int, stop: int) -> Head:
        """The head of rows [start, stop)."""
        return dataclasses.replace(
            self,
            x_NH=self.x_NH[start:stop],
            target_N=self.target_N[start:stop],
            ignored_N=self.ignored_N[start:stop],
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of losses and sums: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b as float32 (float64 stays).

    Half precision is rounded on the way only where torch offers no wide result: on the CPU.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _check_targets(target_N: torch.Tensor, ignored_N: torch.Tensor, vocab: int) -> None:
    if target_N.device.type != "cpu":
        return
    wrong_N = ((target_N < 0) | (target_N >= vocab)) & ~ignored_N
    if bool(wrong_N.any()):
        row = int(wrong_N.nonzero()[0])
        raise IndexError(f"target {int(target_N[row])} of row {row} must be in [0, {vocab}) or ignore_index")
