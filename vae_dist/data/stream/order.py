"""The canonical order of an epoch: which sequence stands where, computed and never stored.

Two levels of shuffle over the N sequences of a split, so that resuming at any step of a corpus of any size costs
no scan and no memory:

1. Blocks of `block_sequences` neighbours, each one sequential read, are dealt to the S streams. Up to 8 neighbouring
   blocks form a stripe; the stripes are permuted over the whole split, and the blocks of a stripe go to different
   streams at the same place: what a corpus holds in one region comes to them together, so that their windows are
   alike in length.
2. Every stream permutes what it was dealt within windows of `window_sequences`.

`windows.py` says which of a stream's positions make up which batch. Nothing here depends on world size, loader
threads or token budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 6
_STRIPE_BLOCKS = 8


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
        block_sequences: of the first level of the shuffle.
        window_sequences: of the second level.
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

    @property
    def stripe_blocks(self) -> int:
        """Blocks in a stripe: the largest divisor of S up to 8."""
        return max(d for d in range(1, _STRIPE_BLOCKS + 1) if self.streams % d == 0)

    @property
    def blocks_per_stream(self) -> int:
        """Whole blocks that every stream is dealt; what is left over is divided sequence by sequence."""
        return self.sequences // self.block_sequences // self.streams

    def left_over(self, stream: int) -> tuple[int, int]:
        """The stream's part of what is left over when every stream has its blocks."""
        count = self.sequences - self.blocks_per_stream * self.streams * self.block_sequences
        return stream * count // self.streams, (stream + 1) * count // self.streams

    def stream_sequences(self, stream: int) -> int:
        """Sequences of a stream in an epoch; those of two streams differ by one at most."""
        begin, end = self.left_over(stream)
        return self.blocks_per_stream * self.block_sequences + end - begin


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
    """The order of one epoch: from a stream's positions to sequence numbers."""

    def __init__(self, spec: OrderSpec, epoch: int) -> None:
        self.spec = spec
        self._key = mix(int(spec.manifest_hash[:16], 16), spec.seed, epoch)
        self._stripe = spec.stripe_blocks * spec.block_sequences
        self._stripes = spec.sequences // self._stripe
        # Streams that are congruent modulo this share their stripes: with so many ranks, those of one rank.
        self._groups = spec.streams // spec.stripe_blocks

    def key(self, *parts: int) -> int:
        """A key for what else is drawn in this epoch."""
        return mix(self._key, *parts)

    def window_size(self, stream: int, window: int) -> int:
        """Sequences in a stream's shuffle window; the last one may be short, those after it are empty."""
        size = self.spec.window_sequences
        return max(0, min(size, self.spec.stream_sequences(stream) - window * size))

    def runs(self, stream: int, window: int) -> list[tuple[int, int]]:
        """The (first sequence, count) of every block or part of one in a shuffle window: what to read."""
        begin = window * self.spec.window_sequences
        end = begin + self.window_size(stream, window)
        dealt = self.spec.blocks_per_stream * self.spec.block_sequences
        first_left = self.spec.left_over(stream)[0] - dealt
        runs = self._dealt(stream, begin, min(end, dealt)) if begin < dealt else []
        return runs + self._left_over(first_left + max(begin, dealt), first_left + end)

    def permutation(self, stream: int, window: int) -> np.ndarray:
        """How a shuffle window is permuted: entry i is the place, in the order of `runs`, of position i. int64."""
        number = np.arange(self.window_size(stream, window), dtype=np.uint64)
        # A bijection of 64-bit numbers: no two keys are equal, so the sorted order is one and the same everywhere.
        return np.argsort(_scramble(number ^ np.uint64(self.key(2, stream, window))))

    def sequence_numbers(self, stream: int, first: int, count: int) -> np.ndarray:
        """Sequence numbers at the stream's positions [first, first + count), shuffled. int64[count]."""
        size, parts = self.spec.window_sequences, [np.empty(0, dtype=np.int64)]
        for window in range(first // size, -(-(first + count) // size)):
            listed = [np.arange(begin, begin + run, dtype=np.int64) for begin, run in self.runs(stream, window)]
            shuffled = np.concatenate(listed)[self.permutation(stream, window)]
            base = window * size
            parts.append(shuffled[max(first - base, 0) : first + count - base])
        return np.concatenate(parts)

    def owner(self, sequence: int) -> tuple[int, int]:
        """The way back: the stream that holds a sequence in this epoch, and in which of its shuffle windows."""
        spec = self.spec
        stripe, inside = divmod(sequence, self._stripe)
        place = stripe
        if stripe < self._stripes:
            place = int(permute(np.array([stripe]), self._stripes, self.key(1), inverse=True)[0])
        turns = spec.blocks_per_stream
        if place < self._groups * turns:
            group, turn = divmod(place, turns)
            column, at = divmod(inside, spec.block_sequences)
            turned = int(self._turn(np.array([stripe]))[0])
            stream = group + self._groups * ((column - turned) % spec.stripe_blocks)
            position = turn * spec.block_sequences + at
        else:
            left = (place - self._groups * turns) * self._stripe + inside
            # The last stream whose part begins at or before it.
            stream = ((left + 1) * spec.streams - 1) // spec.left_over(spec.streams - 1)[1]
            position = turns * spec.block_sequences + left - spec.left_over(stream)[0]
        return stream, position // spec.window_sequences

    def _dealt(self, stream: int, begin: int, end: int) -> list[tuple[int, int]]:
        """The runs of positions [begin, end) among the blocks that the stream was dealt."""
        size = self.spec.block_sequences
        turn = np.arange(begin // size, -(-end // size), dtype=np.int64)
        column, group = divmod(stream, self._groups)
        stripe = permute(group * self.spec.blocks_per_stream + turn, self._stripes, self.key(1))
        block = stripe * self.spec.stripe_blocks + (column + self._turn(stripe)) % self.spec.stripe_blocks
        start = block * size + np.maximum(begin - turn * size, 0)
        stop = block * size + np.minimum(end - turn * size, size)
        return list(zip(start.tolist(), (stop - start).tolist(), strict=True))

    def _left_over(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The runs of positions [begin, end) of the stripes that were not dealt and of what fills no stripe."""
        runs = []
        while begin < end:
            number, inside = divmod(begin, self._stripe)
            place = self._groups * self.spec.blocks_per_stream + number
            stripe = place
            if place < self._stripes:
                stripe = int(permute(np.array([place]), self._stripes, self.key(1))[0])
            count = min(end - begin, self._stripe - inside)
            runs.append((stripe * self._stripe + inside, count))
            begin += count
        return runs

    def _turn(self, stripe: np.ndarray) -> np.ndarray:
        """By how much the blocks of a stripe are turned, so that no stream always gets the same one."""
        turned = _scramble(stripe.astype(np.uint64) ^ np.uint64(self.key(5)))
        return (turned % np.uint64(self.spec.stripe_blocks)).astype(np.int64)
