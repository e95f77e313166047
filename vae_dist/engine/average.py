"""An exponential moving average of the weights (Polyak and Juditsky 1992): validated and exported in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """Averages of a module's trainable parameters, whole on every rank (so not for ZeRO-3).

    The first steps average over fewer: the decay of update t is min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.updates = 0

    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [p.detach() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.values.values()), weights, 1.0 - decay)
        self.updates += 1

    def restart(self) -> None:
        """Forget the past: begin again from the present weights."""
        for name, parameter in self._parameters.items():
            self.values[name].copy_(parameter.detach())
        self.updates = 0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module computes with the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.data.copy_(self.values[name])
            self.values[name].copy_(kept)
