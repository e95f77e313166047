"""Where the wall time of a run goes, over all restarts of its directory: every second is in exactly one part.

    initialise   from the command to the first step (data prepared, Ray and workers started, model built)
    data_wait    steps wait for their sequences
    step         everything else of a step, logging included
    checkpoint   training stands still for a checkpoint
    evaluation   validation, and what follows the last step on all workers
    lost_work    `step` and `data_wait` of steps that a restart had to repeat
    restart      from an interruption to the next step

Goodput is `step` over their sum: the share of the wall time that is work, steps that were repeated counted once.
`estimate/goodput.py` forecasts the same, with data and evaluation taking no time. The first step's compilation is in
`step`. A pause after a run was stopped on request belongs to no part.

A thread writes the parts to `wall_time.json` every half second, so that a process that is killed leaves them, and the
time it was killed at, to the next one; what it did in its last half second counts as `restart`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from vae_dist.observe.activity import Activity

FILE = "wall_time.json"
PARTS = ("initialise", "data_wait", "step", "checkpoint", "evaluation", "lost_work", "restart")
_REPEATED = ("step", "data_wait")
_WRITE_SECONDS = 0.5
# Checkpoints that a restart may go back to; older ones are deleted or damaged.
_REMEMBERED = 64

T = TypeVar("T")


class WallTime:
    """The parts, kept by one process at a time; seconds since the epoch on that host's clock.

    Attributes:
        seconds: by part.
        activity: what happens inside the parts.
        lost_steps: steps that were made and repeated.
    """

    def __init__(
        self, run_dir: Path | None, activity: Activity, started_at: float, clock: Callable[[], float] = time.time
    ) -> None:
        """Go on from what an interrupted process left in `run_dir`, if anything; None keeps no file.

        Args:
            activity: knows the step; every part but `step` is a span of it.
            started_at: when the command was given.
        """
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.activity, self.lost_steps = activity, 0
        self._clock, self._mark, self._part = clock, started_at, "initialise"
        self._work_at: dict[int, list[float]] = {}
        self._path = run_dir / FILE if run_dir else None
        self._stopped_on_request, self._over, self._lock = False, threading.Event(), threading.Lock()
        left = _read(self._path) if self._path else None
        if left:
            self._go_on(left, activity.step, started_at)
        self._thread = threading.Thread(target=self._keep_written, name="wall-time", daemon=True)
        if self._path:
            self._thread.start()

    def _go_on(self, left: dict[str, Any], resume_step: int, started_at: float) -> None:
        """Move the steps that will be repeated to `lost_work`; all until the next step is `restart`."""
        self.seconds |= left["seconds"]
        self.lost_steps = left["lost_steps"] + max(0, left["step"] - resume_step)
        self._work_at = {int(step): work for step, work in left["work_at"].items() if int(step) <= resume_step}
        kept = self._work_at.get(resume_step, [0.0] * len(_REPEATED))
        for part, seconds in zip(_REPEATED, kept, strict=True):
            self.seconds["lost_work"] += self.seconds[part] - seconds
            self.seconds[part] = seconds
        self._part = "restart"
        self._mark = max(left["at"], started_at) if left["stopped_on_request"] else left["at"]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What passes inside belongs to this part; a part inside another takes its time from it."""
        outer = self._enter(name)
        if name == "checkpoint":
            with self._lock:
                self._work_at[self.activity.step] = [self.seconds[part] for part in _REPEATED]
        try:
            with self.activity.span(name):
                yield
        finally:
            self._enter(outer)

    def waiting_for(self, items: Iterator[T]) -> Iterator[T]:
        """The items of the steps; waiting for the first ends `initialise` or `restart`, for others is `data_wait`."""
        part = self._part
        while True:
            with self.part(part):
                item = next(items, None)
            if item is None:
                return
            if part != "data_wait":
                self._enter("step")
                part = "data_wait"
            yield item

    @property
    def is_training(self) -> bool:
        """Whether steps are made, and no checkpoint or evaluation."""
        return self._part in _REPEATED

    def values(self) -> dict[str, float]:
        """Up to now: every part as `wall_<part>_seconds`, their sum, `goodput` (a share) and `lost_steps`."""
        self._enter(self._part)
        wall = sum(self.seconds.values())
        return {
            "goodput": self.seconds["step"] / wall if wall > 0.0 else 0.0,
            "wall_seconds": wall,
            **{f"wall_{part}_seconds": self.seconds[part] for part in PARTS},
            "lost_steps": self.lost_steps,
        }

    def close(self, stopped_on_request: bool) -> None:
        """Write the last state; what follows is not counted."""
        self._stopped_on_request = stopped_on_request
        self._over.set()
        if self._path:
            self._thread.join()
            self._write()

    def _enter(self, part: str) -> str:
        """Close the account of the current part and open this one's; returns the name of the former."""
        with self._lock:
            now, before = self._clock(), self._part
            self.seconds[before] += now - self._mark
            self._mark, self._part = now, part
        return before

    def _keep_written(self) -> None:
        while not self._over.wait(_WRITE_SECONDS):
            self._write()

    def _write(self) -> None:
        assert self._path is not None
        with self._lock:
            now = self._clock()
            state = {
                "seconds": self.seconds | {self._part: self.seconds[self._part] + now - self._mark},
                "at": now,
                "step": self.activity.step,
                "lost_steps": self.lost_steps,
                "work_at": dict(sorted(self._work_at.items())[-_REMEMBERED:]),
                "stopped_on_request": self._stopped_on_request,
            }
        temporary = self._path.with_suffix(".tmp")
        # A disk that is full for a while is no reason to end a run.
        with suppress(OSError):
            temporary.write_text(json.dumps(state), encoding="utf-8")
            os.replace(temporary, self._path)


def _read(path: Path) -> dict[str, Any] | None:
    """What was left there; None where there is nothing, or, after a power cut, nothing whole."""
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return state
