"""Many token sequences in two flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Sequences:
    """n sequences; sequence i is tokens[offsets[i] : offsets[i + 1]].

    Attributes:
        tokens: unsigned or signed integers, flat; nothing but the sequences.
        offsets: int64[n + 1], from 0 to len(tokens).
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

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.tokens.nbytes + self.offsets.nbytes

    def slice(self, begin: int, end: int) -> Sequences:
        """The sequences [begin, end), not copied."""
        offsets = self.offsets[begin : end + 1]
        return Sequences(self.tokens[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, indices: np.ndarray | Sequence[int]) -> Sequences:
        """The sequences at `indices`, in that order, copied."""
        indices = np.asarray(indices, dtype=np.int64)
        starts = self.offsets[indices]
        lengths = self.offsets[indices + 1] - starts
        offsets = np.zeros(len(indices) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        tokens = np.empty(int(offsets[-1]), dtype=self.tokens.dtype)
        # Position p of the result comes from its sequence's start plus how far p is into the sequence.
        shift = starts - offsets[:-1]
        # Piece by piece: the positions of a whole window would not stay in cache.
        for row in range(0, len(indices), _ROWS_AT_ONCE):
            end = min(row + _ROWS_AT_ONCE, len(indices))
            here = slice(int(offsets[row]), int(offsets[end]))
            source = np.repeat(shift[row:end], lengths[row:end])
            source += np.arange(here.start, here.stop)
            np.take(self.tokens, source, out=tokens[here], mode="clip")
        return Sequences(tokens, offsets)

    @staticmethod
    def concatenate(parts: Sequence[Sequences]) -> Sequences:
        """All parts in order; no part at all gives no sequence."""
        if not parts:
            return Sequences(np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([p.lengths for p in parts])
        tokens = np.concatenate([p.tokens for p in parts])
        return Sequences(tokens, np.concatenate([[0], np.cumsum(lengths)]))

    @staticmethod
    def from_list(rows: Sequence[np.ndarray]) -> Sequences:
        """Sequences from one array each."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        tokens = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        return Sequences(tokens, np.concatenate([[0], np.cumsum(lengths)]))
