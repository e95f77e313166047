"""The folder in which a prepare keeps what is finished, so that a killed one goes on where it stopped.

<out>/.work/plan.json             what is being made; another plan means that nothing here can be used
<out>/.work/<stage>-000012.*      what task 12 of a stage wrote
<out>/.work/<stage>-000012.json   its record, written last: the task is finished when this is there
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vae_dist.data.prepare.tasks import Progress, Run
from vae_dist.data.store.folder import Folder
from vae_dist.errors import DataError, MachineError

PLAN = "plan.json"

Record = dict[str, Any]
"""What is known of a finished task; JSON-able. `texts` is how many texts it went through, for the progress."""


@dataclass(frozen=True)
class _Task:
    """One task of a stage, with its record; what executors run."""

    work: Folder
    stage: str
    function: Callable[[int, Any], Record]

    def __call__(self, item: tuple[int, Any]) -> tuple[int, Record]:
        number, content = item
        try:
            if not self.work.has(PLAN):
                raise DataError(
                    f"This process does not see {self.work.path}. On a cluster of several machines prepare into a "
                    "directory that all of them share, or into an object store."
                )
            record = self.function(number, content)
            self.work.write_json(record_name(self.stage, number), record)
        except OSError as error:
            raise cannot_write(self.work.path, error) from None
        return number, record


def record_name(stage: str, number: int) -> str:
    """File name of the record of a task."""
    return f"{stage}-{number:06d}.json"


def cannot_write(path: str, error: OSError) -> MachineError:
    """The error for a folder that cannot be written, or read again."""
    return MachineError(f"{path} cannot be written: {error}. Make room or choose another.")


@dataclass(frozen=True)
class Stages:
    """Runs stages: what is finished is taken from the folder, the rest is given to the executor."""

    work: Folder
    run: Run
    progress: Progress

    def finish(
        self, stage: str, function: Callable[[int, Any], Record], items: Sequence[Any], sizes: Sequence[int]
    ) -> list[Record]:
        """The records of all tasks of a stage, in order.

        Args:
            function: from a task's number and item to its record; what it writes has the number in its name.
            sizes: how much each task goes through, in bytes or sequences, for the progress.

        Raises:
            DataError: of a task, as the task raised it.
            MachineError: the folder cannot be written.
        """
        there = self.work.names()
        found: dict[int, Record] = {}
        for number in range(len(items)):
            if record_name(stage, number) in there:
                found[number] = self.work.read_json(record_name(stage, number))
        pending = [(number, item) for number, item in enumerate(items) if number not in found]
        if not pending:
            return [found[number] for number in range(len(items))]
        self.progress.begin(stage, sum(sizes), sum(sizes[n] for n in found))
        try:
            for number, record in self.run(_Task(self.work, stage, function), pending):
                found[number] = record
                self.progress.advance(sizes[number], record.get("texts", 0))
        finally:
            self.progress.end()
        return [found[number] for number in range(len(items))]
