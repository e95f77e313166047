"""Many token sequences in two flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sequences:
    """n sequences; sequence i is tokens[offsets[i] : offsets[i + 1]].

    Attributes:
        tokens: unsigned or signed integers, flat.
        offsets: int64[n + 1], from 0.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """int64[n]."""
        return np.diff(self.offsets)

    def take(self, indices: np.ndarray | Sequence[int]) -> Sequences:
        """The sequences at `indices`, in that order, copied."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Position p of the result comes from its sequence's start plus how far p is into the sequence.
        source = np.repeat(self.offsets[indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Sequences(self.tokens[source], offsets)

    @staticmethod
    def concatenate(parts: Sequence[Sequences]) -> Sequences:
        """All parts in order; no part at all gives no sequence."""
        if not parts:
            return Sequences(np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
        lengths = np.concatenate([p.lengths for p in parts])
        tokens = np.concatenate([p.tokens[p.offsets[0] : p.offsets[-1]] for p in parts])
        return Sequences(tokens, np.concatenate([[0], np.cumsum(lengths)]))

    @staticmethod
    def from_list(rows: Sequence[np.ndarray]) -> Sequences:
        """Sequences from one array each."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        tokens = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        return Sequences(tokens, np.concatenate([[0], np.cumsum(lengths)]))
