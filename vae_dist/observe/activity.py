"""What a rank is doing: spans with a name, the last one's age, and for chosen steps a trace that Perfetto opens.

Spans of a step are `data_wait`, `agree` (on the number of micro-batches), `forward`, `backward`, inside it `reduce`
(what of the reduction is left when the gradients are there; ZeRO above 0 begins it earlier), and `optimizer`; besides
there are `checkpoint` and `evaluation`. Times are the host's: what a GPU does meanwhile, torch.profiler says.

`trace/rank-00000.jsonl` has one event a line in the JSON array form of the Trace Event Format (Google, 2016): the first
line opens the array, every other ends with a comma, and nothing need close it: what a killed process leaves is whole.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from vae_dist.observe.profile import StepProfiler

# What a rank does without waiting for others: their time is compared over ranks. (ZeRO-3 gathers weights in forward.)
_ALONE = ("data_wait", "forward")


class Activity:
    """The spans of one rank.

    Attributes:
        step: steps made; what happens now is of the next one.
        name: of the open span; "" between spans.
        changed_at: when a span last began or ended, `time.monotonic`.
        changes: how many times one did: equal on ranks that are equally far.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        device: torch.device,
        trace_steps: Sequence[int] = (0, -1),
        profile: bool = False,
    ) -> None:
        """Nothing is open yet.

        Args:
            trace_steps: first and last step of the trace, counted from 1.
            profile: torch.profiler, too, in those steps.
        """
        self.step, self.name, self.changed_at, self.changes = 0, "", time.monotonic(), 0
        self._rank, self._path = rank, run_dir / "trace" / f"rank-{rank:05d}.jsonl"
        self._first, self._last = trace_steps
        self._profiler = StepProfiler(run_dir, rank, self._first, self._last) if profile else None
        self._file: TextIO | None = None
        self._alone_seconds = 0.0
        self._device_spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._on_gpu = device.type == "cuda"

    def before_step(self) -> None:
        """Open or close the profiler where this step asks for it."""
        if self._profiler:
            self._profiler.before_step(self.step + 1)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What happens inside has this name, except where a span inside has another."""
        outer, began, on_device = self.name, time.time(), self._on_gpu and name == "forward"
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) if on_device else None
        if events:
            events[0].record()
        self._change(name)
        try:
            yield
        finally:
            self._change(outer)
            seconds = time.time() - began
            if events:
                events[1].record()
                self._device_spans.append(events)
            elif name in _ALONE:
                self._alone_seconds += seconds
            if self._first <= self.step + 1 <= self._last:
                self._write({"name": name, "ph": "X", "ts": began * 1e6, "dur": seconds * 1e6})

    def take_alone_seconds(self) -> float:
        """Time in spans that wait for no other rank since this was last asked; waits for the device."""
        if self._device_spans:
            self._device_spans[-1][1].synchronize()
        on_device = sum(first.elapsed_time(last) for first, last in self._device_spans) / 1e3
        seconds, self._alone_seconds, self._device_spans = self._alone_seconds + on_device, 0.0, []
        return seconds

    def close(self) -> None:
        """Write what is open."""
        if self._profiler:
            self._profiler.end()
        if self._file:
            self._file.close()

    def _change(self, name: str) -> None:
        self.name, self.changed_at = name, time.monotonic()
        self.changes += 1

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is None:
            self._path.parent.mkdir(exist_ok=True)
            is_new = not self._path.exists()
            self._file = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - lives as long as the run
            name = {"name": f"rank {self._rank} on {socket.gethostname()}"}
            if is_new:
                self._file.write("[\n")
            self._write({"name": "process_name", "ph": "M", "args": name})
        placed = {"pid": self._rank, "tid": os.getpid(), "args": {"step": self.step + 1}}
        self._file.write(json.dumps(placed | event) + ",\n")
