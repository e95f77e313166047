"""The canonical order: which sequences make up a global batch, as a pure function of its step.

Two levels of shuffle over the N sequences of a split, both computed and never stored, so that resuming
at any step of a corpus of any size costs no scan and no memory:

1. blocks of `block_sequences` neighbours are permuted over the whole split (reads stay sequential),
2. stream s of S owns the positions [s*N/S, (s+1)*N/S) of that list and permutes them within windows of
   `window_sequences`.

A batch of B takes g = B/S sequences from every stream. A stream cuts its positions into groups windows
of K*g, sorts each by length and cuts K equal groups; one permutation of the K groups, shared by all
streams, says which group is used when, so a batch is homogeneous in length and unbiased per sequence.
What does not fill a batch at the end of an epoch forms its last batch, padded with weight zero.

Nothing here depends on world size, loader threads or token budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class OrderSpec:
    """Everything the order is a function of.

    Attributes:
        sequences: N, sequences in the split.
        manifest_hash: hex digest of the data set's manifest.
        seed: the run's seed.
        streams: S.
        batch_sequences: B, a multiple of S.
        length_groups: K.
        block_sequences, window_sequences: the two levels of the shuffle.
    """

    sequences: int
    manifest_hash: str
    seed: int
    streams: int
    batch_sequences: int
    length_groups: int
    block_sequences: int
    window_sequences: int

    @property
    def group_sequences(self) -> int:
        """g = B / S, sequences a stream gives to one batch."""
        return self.batch_sequences // self.streams

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the padded last one included."""
        return -(-self.sequences // self.batch_sequences)

    def real_sequences(self, step: int) -> int:
        """B_real of global step `step`: B, or what is left in the last batch of an epoch."""
        if (step + 1) % self.steps_per_epoch:
            return self.batch_sequences
        return self.sequences - (self.steps_per_epoch - 1) * self.batch_sequences

    def stream_range(self, stream: int) -> tuple[int, int]:
        """First and one-past-last position of a stream in the epoch's block-permuted list."""
        return stream * self.sequences // self.streams, (stream + 1) * self.sequences // self.streams


def permute(index: np.ndarray, size: int, key: int, *, inverse: bool = False) -> np.ndarray:
    """A pseudo-random permutation of [0, size), evaluated at `index` in O(1) memory.

    A balanced Feistel network over the next even power of two, walked until the value falls inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4: cycle walking).

    Args:
        index: int64 array of values in [0, size).
        size: size of the domain, at least 1.
        key: any integer; equal keys give equal permutations.
        inverse: evaluate the inverse permutation instead.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    round_keys = [np.uint64(mix(key, r)) for r in range(_FEISTEL_ROUNDS)]
    network = _feistel_inverse if inverse else _feistel
    value = network(index.astype(np.uint64), half_bits, round_keys)
    outside = value >= size
    while outside.any():
        value[outside] = network(value[outside], half_bits, round_keys)
        outside = value >= size
    return value.astype(np.int64)


def mix(*parts: int) -> int:
    """A 64-bit hash of integers (splitmix64 finaliser, Steele et al. 2014), for deriving keys."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


def _feistel(value: np.ndarray, half_bits: int, round_keys: list[np.uint64]) -> np.ndarray:
    mask = np.uint64((1 << half_bits) - 1)
    left, right = value >> np.uint64(half_bits), value & mask
    for round_key in round_keys:
        left, right = right, left ^ (_scramble(right ^ round_key) & mask)
    return (left << np.uint64(half_bits)) | right


def _feistel_inverse(value: np.ndarray, half_bits: int, round_keys: list[np.uint64]) -> np.ndarray:
    mask = np.uint64((1 << half_bits) - 1)
    left, right = value >> np.uint64(half_bits), value & mask
    for round_key in reversed(round_keys):
        left, right = right ^ (_scramble(left ^ round_key) & mask), left
    return (left << np.uint64(half_bits)) | right


def _scramble(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = (value + _GOLDEN) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class EpochOrder:
    """The order of one epoch: stream positions to sequence numbers, and groups to batches."""

    def __init__(self, spec: OrderSpec, epoch: int) -> None:
        self.spec = spec
        self.epoch = epoch
        self._key = mix(int(spec.manifest_hash[:16], 16), spec.seed, epoch)
        self._blocks = -(-spec.sequences // spec.block_sequences)
        # The last block may be short; where it lands shifts every later position by what it lacks.
        self._short_size = spec.sequences - (self._blocks - 1) * spec.block_sequences
        last = np.array([self._blocks - 1], dtype=np.int64)
        self._short_at = int(permute(last, self._blocks, mix(self._key, 1), inverse=True)[0])

    def sequence_numbers(self, stream: int, first: int, count: int) -> np.ndarray:
        """Sequence numbers at the stream's positions [first, first + count), shuffled. int64[count]."""
        begin, end = self.spec.stream_range(stream)
        position = np.arange(first, first + count, dtype=np.int64)
        window = position // self.spec.window_sequences
        shuffled = np.empty_like(position)
        for number in np.unique(window):
            here = window == number
            base = int(number) * self.spec.window_sequences
            size = min(self.spec.window_sequences, end - begin - base)
            shuffled[here] = base + permute(position[here] - base, size, mix(self._key, 2, stream, int(number)))
        return self._at_list_position(begin + shuffled)

    def windows(self) -> int:
        """Length-sorting windows in the epoch."""
        return -(-self.spec.steps_per_epoch // self.spec.length_groups)

    def groups_in_window(self, window: int) -> int:
        """Batches that the window provides: K, fewer in the last one."""
        return min(self.spec.length_groups, self.spec.steps_per_epoch - window * self.spec.length_groups)

    def group_order(self, window: int) -> np.ndarray:
        """Which length group is used at each of the window's steps, the same for all streams.

        The last group of the epoch is the one that may be short, so it stays last.
        """
        groups = self.groups_in_window(window)
        movable = groups - 1 if window == self.windows() - 1 else groups
        order = np.arange(groups, dtype=np.int64)
        if movable > 1:
            order[:movable] = permute(order[:movable], movable, mix(self._key, 3, window))
        return order

    def groups(self, window: int, numbers: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Cut a stream's window into length groups.

        Args:
            window: number of the window in the epoch.
            numbers: the window's sequence numbers in stream order, as `sequence_numbers` gives them.
            lengths: their lengths in tokens.

        Returns:
            one int64 array of indices into `numbers` per step of the window, in the order of use. All hold
            g sequences, but for the epoch's last, which holds what is left.
        """
        size, count = self.spec.group_sequences, self.groups_in_window(window)
        full = len(numbers) - (count - 1) * size if window == self.windows() - 1 else size
        # What is left over is taken in shuffled order, not by length: sorting would always leave the longest.
        sortable = len(numbers) - full if window == self.windows() - 1 else len(numbers)
        # Ties are broken by a hash, or equal lengths would stay in corpus order.
        tie = _scramble(numbers[:sortable].astype(np.uint64) ^ np.uint64(mix(self._key, 4)))
        by_length = np.lexsort((tie, lengths[:sortable]))
        cut = [by_length[i * size : (i + 1) * size] for i in range(sortable // size)]
        if sortable < len(numbers):
            cut.append(np.arange(sortable, len(numbers), dtype=np.int64))
        while len(cut) < count:
            cut.append(np.empty(0, dtype=np.int64))
        return [cut[i] for i in self.group_order(window)]

    def _at_list_position(self, position: np.ndarray) -> np.ndarray:
        size = self.spec.block_sequences
        short_begin = self._short_at * size
        missing = size - self._short_size
        after = position >= short_begin + self._short_size
        padded = np.where(after, position + missing, position)
        block = permute(padded // size, self._blocks, mix(self._key, 1))
        return block * size + padded % size
