"""What a contender is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from problem import Inputs

# mean: forward and backward of the mean; per_token: of rows with an upstream gradient each; forward: mean, no gradient.
TASKS = ("mean", "per_token", "forward")

Loss = Callable[[Inputs, str], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to the loss.

    Attributes:
        dtype: of the inputs, and so of the gradients.
        make: what it is run with, made anew for each shape and task; raises where the contender cannot run.
        rows: [N], the loss of each row as the contender's mean forms it; None where it does not show rows.
    """

    name: str
    dtype: torch.dtype
    make: Callable[[], Loss]
    tasks: tuple[str, ...] = TASKS
    rows: Callable[[Inputs], torch.Tensor] | None = None
    is_ours: bool = False
