"""A contender's turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Turn(NamedTuple):
    """Real target tokens, the seconds they took, and the steps."""

    tokens: int
    seconds: float
    steps: int

    @property
    def tokens_per_second(self) -> float:
        """Speed of the turn."""
        return self.tokens / self.seconds


def take_turn(step: Callable[[], int], seconds: float, min_steps: int) -> Turn:
    """Steps, each of which tells its real tokens, for so long and at least so many."""
    start, tokens, steps = time.perf_counter(), 0, 0
    while steps < min_steps or time.perf_counter() - start < seconds:
        tokens, steps = tokens + step(), steps + 1
    return Turn(tokens, time.perf_counter() - start, steps)
