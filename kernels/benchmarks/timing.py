"""Times of one step, in turns: A B C ... A B C ..., medians over the turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Turn = Callable[[], float]


def alternate(turns: dict[str, Turn], repeats: int) -> dict[str, float]:
    """Median milliseconds of each contender; every contender has its turn before any has its next."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeats):
        for name, turn in turns.items():
            times[name].append(turn())
    # Rounded here, so that the ratios that are reported are those of the times that are reported.
    return {name: round(statistics.median(values), 5) for name, values in times.items()}


def host_turn(run: Callable[[], object], prepare: Callable[[], object]) -> Turn:
    """A turn on the CPU: milliseconds of `run`; `prepare` goes before, untimed."""

    def turn() -> float:
        prepare()
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    return turn


def device_turn(run: Callable[[], object], prepare: Callable[[], object]) -> Turn:
    """A turn on the GPU, by its own clock: `prepare` also keeps it busy while the host queues `run`."""

    def turn() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        prepare()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return turn


class ColdCache:
    """Empties the GPU's L2 cache by writing a buffer four times its size."""

    def __init__(self) -> None:
        size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        self._buffer = torch.empty(max(size, 2**28), dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        """Write; asynchronous, as everything on the device is."""
        self._buffer.zero_()
        # About a millisecond, in which the host queues what is timed: its own pace must not show.
        torch.cuda._sleep(2_000_000)


def copies_beyond_cache(bytes_per_copy: int, most: int = 8) -> int:
    """How many copies of the inputs, used in rotation, exceed the L2 cache four times."""
    return min(most, 1 + 4 * torch.cuda.get_device_properties(0).L2_cache_size // max(bytes_per_copy, 1))
