"""How the tasks of a stage are run, and who is told how far they are: both are given from outside.

The stages of a prepare are lists of tasks that do not depend on each other. Here they run one after the other in this
process; `vae_dist.launch.prepare` runs them in local processes or on a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Run(Protocol):
    """Applies a function to items, of which there is at least one; results may come in any order.

    Function, items and results can be pickled. What the function raises is raised here, as itself.
    """

    def __call__(self, function: Callable[[Item], Result], items: Sequence[Item], /) -> Iterator[Result]: ...


def run_here(function: Callable[[Item], Result], items: Sequence[Item], /) -> Iterator[Result]:
    """One after the other, in this process."""
    return map(function, items)


class Progress(Protocol):
    """Is told how far a prepare is. One stage after the other; a stage that began always ends."""

    def begin(self, stage: str, total: int, done: int) -> None:
        """A stage of `total` units (bytes, sequences), of which an earlier prepare has done `done`."""

    def advance(self, done: int, texts: int) -> None:
        """A task of `done` units has finished, which went through `texts` texts."""

    def end(self) -> None:
        """The stage has ended, or failed."""


class Silent:
    """Tells nobody."""

    def begin(self, stage: str, total: int, done: int) -> None:
        """Nothing."""

    def advance(self, done: int, texts: int) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""
