"""What every contender is given: rows, a weight, targets, and how the rows are weighted.

Shapes: N rows (tokens), H hidden, V vocabulary, B sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

DATA = ("confident", "normal")
ROWS_PER_SEQUENCE = 32
_CONFIDENT_NOISE, _CONFIDENT_SPREAD = 0.5, 8.0


class Shape(NamedTuple):
    """Sizes of a problem."""

    N: int
    H: int
    V: int

    def __str__(self) -> str:
        return f"N{self.N} H{self.H} V{self.V}"


def parse_shape(text: str) -> Shape:
    """Shape of "N,H,V".

    Raises:
        ValueError: not three positive integers.
    """
    sizes = [int(size) for size in text.split(",")]
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(text)
    return Shape(*sizes)


@dataclass(frozen=True)
class Inputs:
    """One problem in one dtype.

    Attributes:
        x: [N, H], a leaf that wants a gradient.
        weight: [V, H], a leaf that wants a gradient.
        target: int64 [N].
        cu_seqlens: int64 [B + 1], offsets of the sequences.
        weight_per_sequence: float32 [B], 1 / N each, so that the weighted sum is the mean over the rows.
        upstream: float32 [N], gradient of each row's loss in the task `per_token`: every sign, a quarter zero.
    """

    x: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    cu_seqlens: torch.Tensor
    weight_per_sequence: torch.Tensor
    upstream: torch.Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in `dtype`, in new memory, without gradients."""
        return replace(self, x=_leaf(self.x, dtype), weight=_leaf(self.weight, dtype))

    def with_a_row_per_sequence(self) -> Inputs:
        """The same leaves with B = N, so that an operation that returns sums of sequences returns rows."""
        offsets = torch.arange(len(self.target) + 1, device=self.x.device)
        return replace(self, cu_seqlens=offsets, weight_per_sequence=self.upstream.new_full((len(self.target),), 1.0))

    def clear(self) -> None:
        """Drop the gradients of both leaves."""
        self.x.grad = self.weight.grad = None

    @property
    def bytes(self) -> int:
        """Size of x and weight, hence of their gradients too."""
        return self.x.nbytes + self.weight.nbytes


def make_inputs(shape: Shape, device: str, data: str, seed: int = 0) -> Inputs:
    """float32 inputs whose numbers are exact in bfloat16, so that all dtypes are given the same problem.

    Args:
        data: "normal": x and logits are standard normal, targets uniform, so that a target's probability is near
            1 / V. "confident": row i is c_i times its target's weight row plus noise, so that p(target) runs from
            about a half to almost one.
    """
    generator = torch.Generator(device).manual_seed(seed)
    noise_NH = torch.randn(shape.N, shape.H, generator=generator, device=device)
    weight_VH = _bfloat16(torch.randn(shape.V, shape.H, generator=generator, device=device) * shape.H**-0.5)
    target_N = torch.randint(0, shape.V, (shape.N,), generator=generator, device=device)
    if data == "confident":
        logit_N = math.log(shape.V) + _CONFIDENT_SPREAD * torch.rand(shape.N, generator=generator, device=device)
        noise_NH = _CONFIDENT_NOISE * noise_NH + logit_N[:, None] * weight_VH[target_N]
    upstream_N = torch.randn(shape.N, generator=generator, device=device) / shape.N
    upstream_N[::4] = 0.0
    starts = torch.arange(0, shape.N, ROWS_PER_SEQUENCE, device=device)
    offsets = torch.cat([starts, starts.new_tensor([shape.N])])
    weights = torch.full((len(starts),), 1.0 / shape.N, device=device)
    x_NH = _bfloat16(noise_NH)
    return Inputs(x_NH.requires_grad_(), weight_VH.requires_grad_(), target_N, offsets, weights, upstream_N)


def _bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float()


def _leaf(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(dtype, copy=True).requires_grad_()
