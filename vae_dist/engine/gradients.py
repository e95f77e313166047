"""The gradient at ZeRO 0, where each rank holds all of it: averaged over the ranks, measured, clipped.

DeepSpeed copies every gradient into a bucket and back to reduce it, with one rank too, and reads it twice more to
clip it. Here large gradients are reduced where they lie, and clipping is a divisor inside the fused update.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

# Elements. Below it a collective costs more than the copy that joins it with others.
_SMALL = 65_536


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average `.grad` over the ranks, in place; a trainable parameter without one gets zeros. Collective.

    Zeros, because ranks must agree on what they reduce, and so that the update is the same on one rank: a missing
    gradient would leave Adam's moments alone.
    """
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient.contiguous()
            gradients.append(parameter.grad)
    if dist.get_world_size() == 1:
        return
    small = [gradient for gradient in gradients if gradient.numel() < _SMALL]
    joined = torch.cat([gradient.reshape(-1) for gradient in small]) if small else torch.empty(0)
    whole = [gradient for gradient in gradients if gradient.numel() >= _SMALL] + [joined] * bool(small)
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in whole]:
        work.wait()
    torch._foreach_div_(whole, dist.get_world_size())
    for gradient, mean in zip(small, joined.split([gradient.numel() for gradient in small]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """L2 norm of the whole gradient, float32[] on its device: nobody waits for it."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_in_update(optimizer: torch.optim.Optimizer, norm: torch.Tensor, max_norm: float) -> None:
    """Have the next update of a fused optimizer divide the gradient so that its norm is at most `max_norm` (0: any)."""
    divisor = (norm.float() / max_norm).clamp(min=1.0) if max_norm else None
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]
