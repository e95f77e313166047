"""What passes between the command and the first step, from mark to mark."""

from __future__ import annotations

import time


class StartUp:
    """Marks in order, on the clocks of the hosts that set them; travels from the driver to rank 0."""

    def __init__(self, started_at: float) -> None:
        self._began, self._marks = started_at, [("", started_at)]

    def mark(self, name: str) -> None:
        """What has passed since the last mark was this."""
        self._marks.append((name, time.time()))

    def message(self) -> str:
        """One line; seconds."""
        times = [at for _, at in self._marks]
        parts = [f"{name} {at - before:.1f}" for (name, at), before in zip(self._marks[1:], times, strict=False)]
        return f"first step after {times[-1] - self._began:.1f} s: {', '.join(parts)}"
