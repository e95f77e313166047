"""Which ranks are slow, by what each took between two log lines without waiting for others."""

from __future__ import annotations

import statistics

# In less, what else a machine does makes ranks look slow.
_LEAST_SECONDS = 1.0


class Stragglers:
    """Names a rank when it becomes slow, and not again while it stays so."""

    def __init__(self, hosts: list[str], factor: float) -> None:
        """Nobody is slow yet.

        Args:
            hosts: of all ranks, in their order.
            factor: times the median that is slow.
        """
        self._hosts, self._factor = hosts, factor
        self._slow: set[int] = set()
        self._seconds = [0.0] * len(hosts)

    def find(self, seconds: list[float]) -> tuple[list[str], float]:
        """A sentence on each rank that has become slow, and the slowest one's time over the median.

        Args:
            seconds: of each rank since the last call; too short times are judged together with the next ones.
        """
        self._seconds = [before + more for before, more in zip(self._seconds, seconds, strict=True)]
        # Of two ranks, the faster one's.
        median = statistics.median_low(self._seconds)
        if median == 0.0:
            return [], 1.0
        times = [own / median for own in self._seconds]
        if max(self._seconds) < _LEAST_SECONDS:
            return [], max(times)
        slow = {rank for rank, ratio in enumerate(times) if ratio > self._factor}
        found = [
            f"rank {rank} on {self._hosts[rank]} is slow: data and forward took {self._seconds[rank]:.3g} s of late, "
            f"{times[rank]:.1f} times the median"
            for rank in sorted(slow - self._slow)
        ]
        self._slow, self._seconds = slow, [0.0] * len(self._hosts)
        return found, max(times)
