"""Which positions of the streams make up a batch: windows sorted by length and cut into equal groups.

A batch of B takes g = B/S sequences from every stream. A stream cuts its positions into windows of about K*g, sorts
each by length and cuts it into groups of g; one permutation of the groups, shared by all streams, says which group is
used when, so a batch is homogeneous in length and unbiased per sequence.

`EpochWindows` is the order of one data set: an epoch holds every sequence once, and what does not fill a batch at
its end forms its last batch, padded with weight zero. `MixtureWindows` draws from several data sets for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from vae_dist.data.stream.order import EpochOrder, OrderSpec, mix, permute

# Weights are turned into whole numbers of this unit, so that shares are exact at any step.
_WEIGHT_BITS = 40
_GROUP_ORDER = 3


@dataclass(frozen=True)
class WindowKey:
    """Names one length window of all streams; `epoch` is 0 in a mixture."""

    epoch: int
    window: int


@dataclass(frozen=True)
class Piece:
    """Neighbouring positions [first, first + count) of a stream, in one epoch of one data set."""

    component: int
    epoch: int
    first: int
    count: int


class Groups(NamedTuple):
    """A stream's window, step by step.

    Attributes:
        places: int64[n], places in the window in the order of use.
        sizes: int64[turns], how many of them each step takes.
    """

    places: np.ndarray
    sizes: np.ndarray


class Windows(Protocol):
    """What a stream needs to know of the order; one OrderSpec a data set."""

    @property
    def specs(self) -> Sequence[OrderSpec]:
        """One for each data set."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches that the data sets fill once."""

    def real_sequences(self, step: int) -> int:
        """Sequences of the global batch that are no padding."""

    def locate(self, step: int) -> tuple[WindowKey, int]:
        """The window of a step, and the step's number in it."""

    def pieces(self, key: WindowKey, stream: int) -> list[Piece]:
        """What a stream reads for a window."""

    def groups(self, key: WindowKey, lengths: np.ndarray) -> Groups:
        """A stream's part of each batch of a window, by the lengths of what it read."""


class EpochWindows:
    """The windows of one data set, epoch after epoch."""

    def __init__(self, spec: OrderSpec) -> None:
        self.specs = (spec,)
        self._spec = spec
        # Windows of equal size: a short one at the end would be cut into coarse groups.
        self._count = max(1, round(spec.steps_per_epoch / spec.length_groups))

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the padded last one included."""
        return self._spec.steps_per_epoch

    def real_sequences(self, step: int) -> int:
        """B_real of global step `step`: B, or what is left in the last batch of an epoch."""
        if (step + 1) % self.steps_per_epoch:
            return self._spec.batch_sequences
        return self._spec.sequences - (self.steps_per_epoch - 1) * self._spec.batch_sequences

    def locate(self, step: int) -> tuple[WindowKey, int]:
        """The window of a global step, and the step's turn in it."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        window = ((step_in_epoch + 1) * self._count - 1) // self.steps_per_epoch
        return WindowKey(epoch, window), step_in_epoch - self._first_step(window)

    def pieces(self, key: WindowKey, stream: int) -> list[Piece]:
        """A stream's positions in a window."""
        first, end = (self._first_step(w) * self._spec.group_sequences for w in (key.window, key.window + 1))
        return [Piece(0, key.epoch, first, min(end, self._spec.stream_sequences(stream)) - first)]

    def groups(self, key: WindowKey, lengths: np.ndarray) -> Groups:
        """Cut a stream's window into length groups of g sequences; the epoch's last holds what is left.

        Args:
            lengths: of the window's sequences, in the stream's shuffled order.
        """
        size = self._spec.group_sequences
        count = self._first_step(key.window + 1) - self._first_step(key.window)
        group_key = EpochOrder(self._spec, key.epoch).key(_GROUP_ORDER, key.window)
        if key.window + 1 < self._count:
            return _cut(lengths, size, count, group_key)
        # What is left over is taken in shuffled order, not by length: sorting would always leave the longest.
        sortable = len(lengths) - max(0, len(lengths) - (count - 1) * size)
        groups = _cut(lengths[:sortable], size, count - 1, group_key)
        left = np.arange(sortable, len(lengths), dtype=np.int64)
        return Groups(np.concatenate([groups.places, left]), np.append(groups.sizes, len(left)))

    def _first_step(self, window: int) -> int:
        """In the epoch; the inverse of what `locate` does."""
        return window * self.steps_per_epoch // self._count


class MixtureWindows:
    """Several data sets in fixed proportions, each repeated in epochs of its own, for as long as the run lasts.

    Window j of a stream takes from data set i what floor((j+1)*w_i*K*g) - floor(j*w_i*K*g) says, and what is left
    from the one with the largest weight: at any window the share of each is exact to a sequence a stream, and the
    place in every data set follows from the step alone. An "epoch" of the mixture is as many batches as all data
    sets together would fill.
    """

    def __init__(self, specs: Sequence[OrderSpec], weights: Sequence[float]) -> None:
        """
        Args:
            specs: one a data set; they differ in `sequences`, `manifest_hash` and the shuffle's sizes at most.
            weights: positive, on any scale; shares of sequences.
        """
        self.specs = tuple(specs)
        self._spec = specs[0]
        self._length_window = self._spec.length_groups * self._spec.group_sequences
        # By the largest first: weights of any size, whose sum may be beyond a float.
        relative = [weight / max(weights) for weight in weights]
        self._units = [round(weight / sum(relative) * 2**_WEIGHT_BITS) for weight in relative]
        self._rest = max(range(len(weights)), key=lambda i: weights[i])
        self._key = mix(*(int(spec.manifest_hash[:16], 16) for spec in specs), self._spec.seed)
        # What rounding takes from the largest must be there.
        if self._length_window < len(specs) ** 2:
            raise ValueError(f"{len(specs)} data sets do not fit windows of {self._length_window} sequences")

    @property
    def shares(self) -> list[float]:
        """Share of the sequences that each data set is to have; they sum to 1."""
        return [units / sum(self._units) for units in self._units]

    @property
    def steps_per_epoch(self) -> int:
        """Batches that all data sets together would fill."""
        return max(1, sum(spec.sequences for spec in self.specs) // self._spec.batch_sequences)

    def real_sequences(self, step: int) -> int:
        """B: a mixture has no last batch."""
        return self._spec.batch_sequences

    def locate(self, step: int) -> tuple[WindowKey, int]:
        """The window of a global step, and the step's turn in it."""
        window, turn = divmod(step, self._spec.length_groups)
        return WindowKey(0, window), turn

    def pieces(self, key: WindowKey, stream: int) -> list[Piece]:
        """A stream's positions in a window, data set by data set, cut where a data set's epoch ends."""
        found = []
        for component, spec in enumerate(self.specs):
            size = spec.stream_sequences(stream)
            position, end = (self._taken(component, window) for window in (key.window, key.window + 1))
            while position < end:
                epoch, first = divmod(position, size)
                count = min(end - position, size - first)
                found.append(Piece(component, epoch, first, count))
                position += count
        return found

    def groups(self, key: WindowKey, lengths: np.ndarray) -> Groups:
        """Cut a stream's window into K length groups of g; see `EpochWindows.groups`."""
        # The data sets stand one after another: shuffled, equal lengths of different ones are mixed.
        order = permute(np.arange(len(lengths)), len(lengths), mix(self._key, 4, key.window))
        spec = self._spec
        groups = _cut(lengths[order], spec.group_sequences, spec.length_groups, mix(self._key, key.window))
        return Groups(order[groups.places], groups.sizes)

    def sequences_by_component(self, steps: int) -> list[int]:
        """Sequences taken from each data set in the first `steps` steps, whole windows counted."""
        windows = -(-steps // self._spec.length_groups)
        return [self._spec.streams * self._taken(i, windows) for i in range(len(self.specs))]

    def _taken(self, component: int, windows: int) -> int:
        """Sequences that a stream has taken from a data set in its first `windows` windows."""
        drawn = windows * self._length_window
        if component != self._rest:
            return drawn * self._units[component] >> _WEIGHT_BITS
        return drawn - sum(self._taken(i, windows) for i in range(len(self.specs)) if i != self._rest)


def _cut(lengths: np.ndarray, size: int, count: int, key: int) -> Groups:
    """`count` groups of `size` neighbours in length, in the order of use. There are count * size lengths."""
    # Stable: equal lengths stay in the shuffled order they came in. Sixteen bits are sorted by radix.
    narrow = lengths.astype(np.uint16) if len(lengths) and lengths.max() < 2**16 else lengths
    by_length = np.argsort(narrow, kind="stable").reshape(count, size)
    order = permute(np.arange(count, dtype=np.int64), max(1, count), key)
    return Groups(by_length[order].reshape(-1), np.full(count, size, dtype=np.int64))
