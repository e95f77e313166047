"""Sums over the sequences of a packed batch. Shapes: N rows in all, B sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from vae_kernels.backend import on_device_of, resolve_backend


def segment_sum(x_N: torch.Tensor, cu_seqlens_B1: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Sum of each sequence's rows, [B] in their dtype, in a fixed order that only that sequence's own rows enter.

    Half precision is summed in float32 and rounded once. Differentiable any number of times.

    Args:
        x_N: floating point [N].
        cu_seqlens_B1: int32 or int64 [B + 1], offsets: 0 first, N last, not decreasing. An empty sequence
            sums to 0.
        backend: "auto", "triton" or "torch".

    Raises:
        TypeError: x that is not a floating point vector.
        ValueError: offsets that do not fit (their values are checked on the CPU only, where it costs no
            wait).
        RuntimeError: backend="triton" where Triton cannot run.
    """
    if x_N.dim() != 1 or not x_N.is_floating_point():
        raise TypeError(f"x must be floating point [N], got {x_N.dtype} {tuple(x_N.shape)}")
    _check_layout(cu_seqlens_B1)
    return _sum(x_N, cu_seqlens_B1, backend)


def segment_ids(cu_seqlens_B1: torch.Tensor, rows: int) -> torch.Tensor:
    """Which sequence each of the `rows` packed rows belongs to, int64 [N]."""
    # output_size spares the device a wait for the sum of the lengths.
    index_B = torch.arange(cu_seqlens_B1.shape[0] - 1, device=cu_seqlens_B1.device)
    return torch.repeat_interleave(index_B, cu_seqlens_B1.diff(), output_size=rows)


def check_offsets(cu_seqlens_B1: torch.Tensor, rows: int) -> None:
    """Raise when the offsets cannot cut `rows` rows into sequences."""
    _check_layout(cu_seqlens_B1)
    # While a graph or a cost is traced there are no values; `segment_sum` looks at them whenever it runs.
    has_values = not torch.compiler.is_compiling() and not isinstance(cu_seqlens_B1, FakeTensor)
    if cu_seqlens_B1.device.type != "cpu" or not has_values:
        return
    first, last = int(cu_seqlens_B1[0]), int(cu_seqlens_B1[-1])
    if first != 0 or last != rows or bool((cu_seqlens_B1.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of rows, {rows}; it goes from {first} to {last}"
            + ("" if (first, last) != (0, rows) else " and decreases in between")
        )


def _check_layout(cu_seqlens_B1: torch.Tensor) -> None:
    if cu_seqlens_B1.dim() != 1 or cu_seqlens_B1.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens_B1.shape)}")
    if cu_seqlens_B1.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens_B1.dtype}")


@torch.library.custom_op("vae_kernels::segment_sum", mutates_args=())
def _sum(x_N: torch.Tensor, cu_seqlens_B1: torch.Tensor, backend: str) -> torch.Tensor:
    check_offsets(cu_seqlens_B1, x_N.shape[0])
    if resolve_backend(backend, x_N) == "triton":
        with on_device_of(x_N):
            return _triton().total(x_N, cu_seqlens_B1)
    wide_N = x_N.contiguous().to(torch.promote_types(x_N.dtype, torch.float32))
    return torch.segment_reduce(wide_N, "sum", offsets=cu_seqlens_B1, axis=0, initial=0).to(x_N.dtype)


@torch.library.custom_op("vae_kernels::segment_sum_backward", mutates_args=())
def _spread(y_B: torch.Tensor, cu_seqlens_B1: torch.Tensor, rows: int, backend: str) -> torch.Tensor:
    if resolve_backend(backend, y_B) == "triton":
        with on_device_of(y_B):
            return _triton().spread(y_B, cu_seqlens_B1, rows)
    return y_B.index_select(0, segment_ids(cu_seqlens_B1, rows))


@_sum.register_fake
def _(x_N: torch.Tensor, cu_seqlens_B1: torch.Tensor, backend: str) -> torch.Tensor:
    return x_N.new_empty(cu_seqlens_B1.shape[0] - 1)


@_spread.register_fake
def _(y_B: torch.Tensor, cu_seqlens_B1: torch.Tensor, rows: int, backend: str) -> torch.Tensor:
    return y_B.new_empty(rows)


def _save_for_sum(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x_N, cu_seqlens_B1, ctx.backend = inputs
    ctx.save_for_backward(cu_seqlens_B1)
    ctx.rows = x_N.shape[0]


def _backward_of_sum(ctx: Any, grad_B: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (cu_seqlens_B1,) = ctx.saved_tensors
    return _spread(grad_B, cu_seqlens_B1, ctx.rows, ctx.backend), None, None


def _save_for_spread(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cu_seqlens_B1, _, ctx.backend = inputs
    ctx.save_for_backward(cu_seqlens_B1)


def _backward_of_spread(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    (cu_seqlens_B1,) = ctx.saved_tensors
    return _sum(grad_N, cu_seqlens_B1, ctx.backend), None, None, None


_sum.register_autograd(_backward_of_sum, setup_context=_save_for_sum)
_spread.register_autograd(_backward_of_spread, setup_context=_save_for_spread)


def _triton() -> Any:
    # Triton is imported only once its kernels are wanted.
    from vae_kernels import segment_sum_triton

    return segment_sum_triton
