"""The contenders for the loss of a linear softmax layer: plain torch, torch's own fused form, and ours.

A contender is a function (inputs, reduction) -> loss in nats: a scalar for "mean", [N] for "none". Shapes: N rows,
H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from contender import TASKS, Contender, Loss
from gpu_peers import gpu_peers
from problem import Inputs

import vae_kernels

# The plain form that ours is measured against, and whose error bounds ours.
YARDSTICK = {torch.float32: "eager_fp32", torch.bfloat16: "eager_bf16_softmax_fp32"}


def step(loss: Loss, inputs: Inputs, task: str) -> torch.Tensor:
    """The loss, with the gradients left in the inputs (none for "forward")."""
    if task == "forward":
        with torch.no_grad():
            return loss(inputs, "mean")
    value = loss(inputs, "mean" if task == "mean" else "none")
    value.backward(None if task == "mean" else inputs.upstream.to(value.dtype))
    return value.detach()


def eager(x_NH: torch.Tensor, weight_VH: torch.Tensor, target_N: torch.Tensor, reduction: str) -> torch.Tensor:
    """Product, softmax and loss in the inputs' dtype."""
    return F.cross_entropy(x_NH @ weight_VH.t(), target_N, reduction=reduction)


def eager_wide(x_NH: torch.Tensor, weight_VH: torch.Tensor, target_N: torch.Tensor, reduction: str) -> torch.Tensor:
    """Product in the inputs' dtype, softmax and loss in float32: what autocast does."""
    return F.cross_entropy((x_NH @ weight_VH.t()).float(), target_N, reduction=reduction)


def compiled(form: Callable[..., Any]) -> Callable[..., Any]:
    """`form` through torch.compile, for the shapes it meets and no others."""
    return torch.compile(form, dynamic=False)


def contenders(device: str) -> list[Contender]:
    """All of them for "cpu" or "cuda", in the order of their turns."""
    single, half = torch.float32, torch.bfloat16
    found = [
        _plain("eager_fp32", single, eager),
        _plain("eager_bf16_softmax_fp32", half, eager_wide),
        _plain("eager_bf16", half, eager),
        _torch_fused("torch_linear_cross_entropy_bf16", None),
        _torch_fused("torch_linear_cross_entropy_options_bf16", torch.nn.LinearCrossEntropyOptions()),
        _compiled("compile_fp32", single, eager, device),
        _compiled("compile_bf16_softmax_fp32", half, eager_wide, device),
    ]
    if device == "cuda":
        # Triton's packages are asked for only where they can run.
        found += gpu_peers()
    return [*found, _ours("ours_fp32", single), _ours("ours_bf16", half)]


def _plain(name: str, dtype: torch.dtype, form: Callable[..., torch.Tensor]) -> Contender:
    def loss(inputs: Inputs, reduction: str) -> torch.Tensor:
        return form(inputs.x, inputs.weight, inputs.target, reduction)

    return Contender(name, dtype, lambda: loss, rows=lambda inputs: loss(inputs, "none"))


def _torch_fused(name: str, options: torch.nn.LinearCrossEntropyOptions | None) -> Contender:
    def loss(inputs: Inputs, reduction: str) -> torch.Tensor:
        x, weight, target = inputs.x, inputs.weight, inputs.target
        return F.linear_cross_entropy(x, weight, target, reduction=reduction, options=options)

    return Contender(name, torch.bfloat16, lambda: loss, rows=lambda inputs: loss(inputs, "none"))


def _compiled(name: str, dtype: torch.dtype, form: Callable[..., torch.Tensor], device: str) -> Contender:
    def make() -> Loss:
        fused = compiled(form)
        return lambda inputs, reduction: fused(inputs.x, inputs.weight, inputs.target, reduction)

    # Compiling takes longer than all the turns on a CPU, so it is done for one task there.
    return Contender(name, dtype, make, tasks=TASKS if device == "cuda" else ("mean",))


def _ours(name: str, dtype: torch.dtype) -> Contender:
    def loss(inputs: Inputs, reduction: str) -> torch.Tensor:
        if reduction == "none":
            nll_N: Any = vae_kernels.linear_cross_entropy(inputs.x, inputs.weight, inputs.target)
            return nll_N
        return _weighted(inputs)[0]

    def rows(inputs: Inputs) -> torch.Tensor:
        with torch.enable_grad():
            return _weighted(inputs.with_a_row_per_sequence())[1]

    return Contender(name, dtype, lambda: loss, rows=rows, is_ours=True)


def _weighted(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(scalar, nll [B]): the path of training, where the weight of each sequence is known beforehand."""
    pair: Any = vae_kernels.linear_cross_entropy(
        inputs.x,
        inputs.weight,
        inputs.target,
        cu_seqlens=inputs.cu_seqlens,
        weight_per_sequence=inputs.weight_per_sequence,
    )
    return pair
