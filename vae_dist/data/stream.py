"""The training stream: step -> this rank's share of the global batch, read ahead in a thread.

The stream holds no position. `share(step)` gives the same answer whatever was read before, so resuming is
starting at another step, and another world size reads the same global batches.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vae_dist.data.batch import Share
from vae_dist.data.dataset import Split
from vae_dist.data.order import EpochOrder, OrderSpec
from vae_dist.data.sequences import Sequences

_READ_AHEAD = 4


@dataclass(frozen=True)
class _Window:
    """One stream's length-sorting window: its sequences and the group used at each step."""

    sequences: Sequences
    groups: list[np.ndarray]


class Stream:
    """One rank's view of the canonical order.

    Rank r of w owns the streams r, r + w, ...; memory is one window of each.
    """

    def __init__(self, split: Split, spec: OrderSpec, rank: int, world_size: int) -> None:
        if spec.streams % world_size:
            raise ValueError(f"world size {world_size} does not divide {spec.streams} streams")
        self._split = split
        self.spec = spec
        self._owned = range(rank, spec.streams, world_size)
        self._order = EpochOrder(spec, 0)
        self._windows: dict[int, _Window] = {}
        self._window_key = (-1, -1)

    def share(self, step: int) -> Share:
        """This rank's sequences of global step `step` (counted from 0 over all epochs)."""
        epoch, step_in_epoch = divmod(step, self.spec.steps_per_epoch)
        window, turn = divmod(step_in_epoch, self.spec.length_groups)
        self._load(epoch, window)
        size = self.spec.group_sequences
        parts, ids = [], []
        for stream in self._owned:
            loaded = self._windows[stream]
            group = loaded.groups[turn]
            parts.append(loaded.sequences.take(group))
            first_slot = step * self.spec.batch_sequences + stream * size
            ids.append(first_slot + np.arange(len(group), dtype=np.int64))
        return Share(Sequences.concatenate(parts), np.concatenate(ids), self.spec.real_sequences(step))

    def shares(self, first_step: int, end_step: int) -> Iterator[Share]:
        """Shares of steps [first_step, end_step), read ahead in a background thread.

        An error while reading is raised here, in the consumer.
        """
        ready: queue.Queue[Share | BaseException] = queue.Queue(maxsize=_READ_AHEAD)
        stopped = threading.Event()

        def put(item: Share | BaseException) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def read() -> None:
            try:
                for step in range(first_step, end_step):
                    if not put(self.share(step)):
                        return
            except BaseException as error:  # handed to the consumer, which raises it
                put(error)

        thread = threading.Thread(target=read, name="stream-read-ahead", daemon=True)
        thread.start()
        try:
            for _ in range(first_step, end_step):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def _load(self, epoch: int, window: int) -> None:
        if self._window_key == (epoch, window):
            return
        if self._order.epoch != epoch:
            self._order = EpochOrder(self.spec, epoch)
        self._windows = {stream: self._read_window(stream, window) for stream in self._owned}
        self._window_key = (epoch, window)

    def _read_window(self, stream: int, window: int) -> _Window:
        begin, end = self.spec.stream_range(stream)
        size = self.spec.length_groups * self.spec.group_sequences
        first = window * size
        numbers = self._order.sequence_numbers(stream, first, min(size, end - begin - first))
        sequences = gather(self._split, numbers, self.spec.block_sequences)
        return _Window(sequences, self._order.groups(window, numbers, sequences.lengths))


def gather(split: Split, numbers: np.ndarray, block_sequences: int) -> Sequences:
    """Sequences by number, in the order asked for, read block by block (sequentially within a block)."""
    order = np.argsort(numbers, kind="stable")
    ascending = numbers[order]
    starts = np.flatnonzero(np.diff(ascending // block_sequences, prepend=-1))
    parts = []
    for start, stop in zip(starts, np.append(starts, len(ascending))[1:], strict=True):
        first, last = int(ascending[start]), int(ascending[stop - 1])
        block = split.read(first, last - first + 1)
        parts.append(block.take(ascending[start:stop] - first))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return Sequences.concatenate(parts).take(back)
