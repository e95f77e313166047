"""torch.profiler over the traced steps, and on GPUs what the memory was used for; both into `trace/`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """Profiles the steps from `first` to `last`; costs nothing before and after."""

    def __init__(self, run_dir: Path, rank: int, first: int, last: int) -> None:
        self._folder, self._rank, self._first, self._last = run_dir / "trace", rank, first, last
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """Begin or end where this step, counted from 1, is the first or the one after the last."""
        if step == self._first:
            self._begin()
        elif step == self._last + 1:
            self.end()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self._profile = profile(activities=activities)
        self._profile.start()

    def end(self) -> None:
        """Write what was begun: profile-rank-N.json for Perfetto, memory-rank-N.pickle for pytorch.org/memory_viz."""
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / f"profile-rank-{self._rank:05d}.json"))
        self._profile = None
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-rank-{self._rank:05d}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
