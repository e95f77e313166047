"""Sequences that stand in more than one split, found by hash with bounded memory.

The hashes of the smaller splits are kept, the largest split passes by. Where the smaller ones are too large for that,
only the sequences whose hash begins with some zero bits are looked at: a sample of the distinct sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vae_dist.data.store.sequences import Sequences

# Hashes kept of all the smaller splits together: 16 bytes each, with the sequence's number.
_KEPT_SEQUENCES = 2**25
_EXAMPLES = 3
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class _Kept:
    """A split that has been read: its distinct hashes, ascending, how often each occurs and where first."""

    hashes: np.ndarray
    counts: np.ndarray
    first: np.ndarray


@dataclass
class _Pair:
    is_found: np.ndarray
    in_later: int = 0
    examples: list[tuple[int, int]] = field(default_factory=list)


class Overlaps:
    """Counts common sequences of every two splits while they are read one after another."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """
        Args:
            sizes: sequences of each split.
        """
        self.order = sorted(sizes, key=lambda name: (sizes[name], name))
        small = sum(sizes[name] for name in self.order[:-1])
        self._bits = max(0, (-(-small // _KEPT_SEQUENCES) - 1).bit_length())
        self._kept: dict[str, _Kept] = {}
        self._pairs: dict[tuple[str, str], _Pair] = {}
        self._held: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, split: str, first: int, sequences: Sequences) -> None:
        """Take the next sequences of a split; splits come in `order`, each whole.

        Args:
            first: number of the first of them in the split.
        """
        # One without a token is a problem of its own, and nothing to compare.
        rows = np.flatnonzero(sequences.lengths)
        whole = sequences if len(rows) == len(sequences) else sequences.take(rows)
        hashes, numbers = sequence_hashes(whole), first + rows
        if self._bits:
            is_sampled = hashes >> np.uint64(64 - self._bits) == 0
            hashes, numbers = hashes[is_sampled], numbers[is_sampled]
        for earlier, kept in self._kept.items():
            if earlier != split and len(kept.hashes):
                pair = self._pairs.setdefault((earlier, split), _Pair(np.zeros(len(kept.hashes), dtype=bool)))
                _compare(kept, pair, hashes, numbers)
        if split != self.order[-1]:
            self._held.append((hashes, numbers))

    def close(self, split: str) -> None:
        """The split has been read."""
        if self._held:
            hashes, numbers = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
            distinct, first, counts = np.unique(hashes, return_index=True, return_counts=True)
            self._kept[split] = _Kept(distinct, counts, numbers[first])
        self._held = []

    def notes(self) -> list[dict[str, Any]]:
        """For every pair of splits with common sequences: `what`, the splits, how many of each, examples' numbers."""
        sample = f" (in a sample of 1 in {2**self._bits} by hash)" if self._bits else ""
        found = []
        for (a, b), pair in self._pairs.items():
            if pair.in_later:
                in_a = int(self._kept[a].counts[pair.is_found].sum())
                shown = ", ".join(f"{i} = {j}" for i, j in pair.examples)
                what = (
                    f"{in_a} sequences of {a} and {pair.in_later} of {b} are the same tokens{sample}, such as {shown}"
                )
                counts = {a: in_a, b: pair.in_later}
                found.append({"what": what, "sequences": counts, "examples": [{a: i, b: j} for i, j in pair.examples]})
        return found


def sequence_hashes(sequences: Sequences) -> np.ndarray:
    """uint64 hash of the tokens of each sequence, none of which is empty."""
    if not len(sequences):
        return np.empty(0, dtype=np.uint64)
    starts = sequences.offsets[:-1]
    position = np.arange(len(sequences.tokens)) - np.repeat(starts, sequences.lengths)
    # A sum of hashes of (position, token): order counts, and it is one pass of numpy.
    placed = mixed(sequences.tokens.astype(np.uint64) | position.astype(np.uint64) << np.uint64(32))
    return mixed(np.add.reduceat(placed, starts) ^ sequences.lengths.astype(np.uint64))


def mixed(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        value = value + _GOLDEN
        value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)


def _compare(kept: _Kept, pair: _Pair, hashes: np.ndarray, numbers: np.ndarray) -> None:
    place = np.minimum(np.searchsorted(kept.hashes, hashes), len(kept.hashes) - 1)
    is_hit = kept.hashes[place] == hashes
    pair.is_found[place[is_hit]] = True
    pair.in_later += int(np.count_nonzero(is_hit))
    for there, here in zip(place[is_hit][:_EXAMPLES], numbers[is_hit][:_EXAMPLES], strict=True):
        if len(pair.examples) < _EXAMPLES:
            pair.examples.append((int(kept.first[there]), int(here)))
