"""The training stream: step -> this rank's share of the global batch, the next window read in the background.

The stream holds no position. `share(step)` gives the same answer whatever was read before, so resuming is
starting at another step, and another world size reads the same global batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from vae_dist.data.store.sequences import Sequences, SequenceView
from vae_dist.data.store.split import Split
from vae_dist.data.stream.batch import Share
from vae_dist.data.stream.order import EpochOrder, OrderSpec
from vae_dist.data.stream.windows import WindowKey, Windows


@dataclass(frozen=True)
class _Prepared:
    """A length window of all of the rank's streams, its sequences in the order of use.

    Attributes:
        bounds: int64[turns + 1]; step `turn` of the window takes sequences [bounds[turn], bounds[turn + 1]).
        slots: int64[n], place of each sequence in its global batch.
        left_out: int64[turns], sequences of each step that damage took.
    """

    key: WindowKey
    sequences: SequenceView
    bounds: np.ndarray
    slots: np.ndarray
    left_out: np.ndarray


class Stream:
    """One rank's view of the canonical order.

    Rank r of w owns the streams r, r + w, ...; it holds a shuffle window of each and two length windows of all.

    Attributes:
        skipped_sequences: how many were left out of the shares that `shares` has given, because of damage.
    """

    def __init__(self, splits: Sequence[Split], windows: Windows, rank: int, world_size: int) -> None:
        """
        Args:
            splits: one a data set, as many as `windows` has.
        """
        spec = windows.specs[0]
        if spec.streams % world_size:
            raise ValueError(f"world size {world_size} does not divide {spec.streams} streams")
        self._windows, self._spec = windows, spec
        self._owned = range(rank, spec.streams, world_size)
        self._feeds = {
            (component, stream): _Feed(split, each, stream)
            for component, (split, each) in enumerate(zip(splits, windows.specs, strict=True))
            for stream in self._owned
        }
        # One thread prepares all windows, so the feeds need no locks; it ends with the stream.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="stream-read-ahead")
        self._prepared: _Prepared | None = None
        self._next: tuple[WindowKey, Future[_Prepared]] | None = None
        self._waited_seconds = 0.0
        self.skipped_sequences = 0

    def share(self, step: int) -> Share:
        """This rank's sequences of global step `step` (counted from 0 over all epochs).

        Raises:
            DataError: a shard is missing or damaged.
        """
        return self._cut(step, *self._window_of(step))

    def shares(self, first_step: int, end_step: int) -> Iterator[Share]:
        """Shares of steps [first_step, end_step), the time that the consumer waits for them counted."""
        for step in range(first_step, end_step):
            asked = time.monotonic()
            prepared, turn = self._window_of(step)
            self._waited_seconds += time.monotonic() - asked
            self.skipped_sequences += int(prepared.left_out[turn])
            yield self._cut(step, prepared, turn)

    def take_waited_seconds(self) -> float:
        """How long the consumer of `shares` has waited since this was last asked."""
        waited, self._waited_seconds = self._waited_seconds, 0.0
        return waited

    def _cut(self, step: int, prepared: _Prepared, turn: int) -> Share:
        begin, end = prepared.bounds[turn : turn + 2]
        slots = step * self._spec.batch_sequences + prepared.slots[begin:end]
        return Share(prepared.sequences.slice(begin, end), slots, self._windows.real_sequences(step))

    def _window_of(self, step: int) -> tuple[_Prepared, int]:
        """The prepared window of a step, its successor begun, and the step's turn in it."""
        key, turn = self._windows.locate(step)
        if self._prepared is None or self._prepared.key != key:
            self._prepared = self._load(key)
            following, _ = self._windows.locate(step - turn + len(self._prepared.bounds) - 1)
            self._next = following, self._background.submit(self._prepare, following)
        return self._prepared, turn

    def _load(self, key: WindowKey) -> _Prepared:
        if self._next is None or self._next[0] != key:
            self._next = key, self._background.submit(self._prepare, key)
        return self._next[1].result()

    def _prepare(self, key: WindowKey) -> _Prepared:
        """Read a window of every owned stream and lay it out step by step, within a step stream by stream."""
        parts, places, turns, slots, size = [], [], [], [], 0
        for stream in self._owned:
            pieces = self._windows.pieces(key, stream)
            taken = [self._feeds[p.component, stream].take(p.epoch, p.first, p.count) for p in pieces]
            window = SequenceView.concatenate(taken)
            groups = self._windows.groups(key, window.lengths)
            in_group = np.arange(len(window)) - np.repeat(np.cumsum(groups.sizes) - groups.sizes, groups.sizes)
            parts.append(window)
            places.append(size + groups.places)
            turns.append(np.repeat(np.arange(len(groups.sizes)), groups.sizes))
            slots.append(stream * self._spec.group_sequences + in_group)
            size += len(window)
        turn = np.concatenate(turns)
        layout = np.argsort(turn.astype(np.uint16) if len(groups.sizes) < 2**16 else turn, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(turn, minlength=len(groups.sizes)))])
        sequences = SequenceView.concatenate(parts).take(np.concatenate(places)[layout])
        return _leave_out_damaged(key, sequences, bounds, np.concatenate(slots)[layout])


def _leave_out_damaged(key: WindowKey, sequences: SequenceView, bounds: np.ndarray, slots: np.ndarray) -> _Prepared:
    """Without the sequences of length 0, which stand for damage; the others keep their slots."""
    is_whole = sequences.lengths > 0
    if is_whole.all():
        return _Prepared(key, sequences, bounds, slots, np.zeros(len(bounds) - 1, dtype=np.int64))
    before = np.concatenate([[0], np.cumsum(is_whole)])
    left_out = np.diff(bounds) - np.diff(before[bounds])
    return _Prepared(key, sequences.take(np.flatnonzero(is_whole)), before[bounds], slots[is_whole], left_out)


class _Feed:
    """One canonical stream of one data set, by position; holds the shuffle window that was read last."""

    def __init__(self, split: Split, spec: OrderSpec, stream: int) -> None:
        self._split, self._spec, self._stream = split, spec, stream
        self._key: tuple[int, int] | None = None
        self._shuffled = Sequences.concatenate([]).view()

    def take(self, epoch: int, first: int, count: int) -> SequenceView:
        """The sequences at positions [first, first + count) of the stream's shuffled list in `epoch`."""
        parts = []
        while count:
            window, inside = divmod(first, self._spec.window_sequences)
            number = min(count, self._spec.window_sequences - inside)
            self._load(epoch, window)
            parts.append(self._shuffled.slice(inside, inside + number))
            first, count = first + number, count - number
        return SequenceView.concatenate(parts)

    def _load(self, epoch: int, window: int) -> None:
        if self._key == (epoch, window):
            return
        order = EpochOrder(self._spec, epoch)
        listed = self._split.read_runs(order.runs(self._stream, window))
        self._shuffled = listed.view().take(order.permutation(self._stream, window))
        self._key = (epoch, window)


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
