"""Averaged weights: their recurrence, and that a module computes with them only while asked to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vae_dist.engine.average import WeightAverage


def walk(module: nn.Linear, average: WeightAverage, steps: int) -> list[torch.Tensor]:
    """Random updates; the weights before and after each."""
    torch.manual_seed(0)
    seen = [module.weight.detach().clone()]
    for _ in range(steps):
        with torch.no_grad():
            module.weight.add_(torch.randn_like(module.weight))
        average.update()
        seen.append(module.weight.detach().clone())
    return seen


def test_the_average_is_its_recurrence_with_a_warm_up() -> None:
    module = nn.Linear(3, 2).double()
    average = WeightAverage(module, 0.9)
    seen = walk(module, average, 120)
    expected = seen[0]
    for number, weight in enumerate(seen[1:]):
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.values["weight"], expected)
    assert average.updates == 120
    # Long after the warm-up the weights of the last steps are geometric.
    assert (1 + 119) / (10 + 119) > 0.9


def test_the_module_computes_with_the_average_only_inside() -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average = WeightAverage(module, 0.5)
    assert average.values.keys() == {"weight"}
    own = walk(module, average, 4)[-1]
    averaged, x = average.values["weight"].clone(), torch.randn(5, 3)
    with average.in_place():
        torch.testing.assert_close(module(x), x @ averaged.T + module.bias)
    assert torch.equal(module.weight, own) and torch.equal(average.values["weight"], averaged)
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    assert torch.equal(module.weight, own) and torch.equal(average.values["weight"], averaged)


def test_a_restart_forgets_the_past() -> None:
    module = nn.Linear(3, 2)
    average = WeightAverage(module, 0.99)
    walk(module, average, 7)
    average.restart()
    assert torch.equal(average.values["weight"], module.weight) and average.updates == 0
