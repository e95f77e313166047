"""What the operations' autograd functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a hand-written backward: run it without a graph, and refuse to be differentiated again.

    torch's `once_differentiable` refuses only when the upstream gradient itself requires one; otherwise the second
    derivative through saved inputs would be missing without a word.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *upstream: torch.Tensor | None) -> Any:
        # Gradients are recorded during a backward pass exactly under create_graph=True.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "vae_kernels operations have no second derivative: call backward or autograd.grad without "
                "create_graph=True"
            )
        return backward(ctx, *upstream)

    return guarded
