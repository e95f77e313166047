"""Many token sequences in flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_ROWS_AT_ONCE = 2048
# A view that uses at least one token in so many of its array is dense.
_DENSE = 16


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
    def starts(self) -> np.ndarray:
        """int64[n], where each sequence begins."""
        return self.offsets[:-1]

    @property
    def lengths(self) -> np.ndarray:
        """int64[n]."""
        return np.diff(self.offsets)

    def view(self) -> SequenceView:
        """The same sequences, to be put in another order without copying a token."""
        return SequenceView(self.tokens, self.starts, self.lengths)

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
        return gather(self.tokens, starts, self.offsets[indices + 1] - starts)

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


@dataclass(frozen=True)
class SequenceView:
    """n sequences that lie anywhere in a flat array: tokens[starts[i] : starts[i] + lengths[i]].

    Attributes:
        tokens: integers, flat; may hold more than these sequences.
        starts, lengths: int64[n].
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index] + self.lengths[index]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def take(self, indices: np.ndarray | Sequence[int]) -> SequenceView:
        """The sequences at `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        return SequenceView(self.tokens, self.starts[indices], self.lengths[indices])

    def slice(self, begin: int, end: int) -> SequenceView:
        """The sequences [begin, end)."""
        return SequenceView(self.tokens, self.starts[begin:end], self.lengths[begin:end])

    @staticmethod
    def concatenate(parts: Sequence[SequenceView]) -> SequenceView:
        """All parts in order, in one flat array.

        A part that uses a good share of its array brings the array as it is, which copies faster than its sequences
        are picked out.
        """
        if len(parts) == 1:
            return parts[0]
        parts = [part if part._is_dense() else part._packed() for part in parts]
        sizes = np.array([len(part.tokens) for part in parts], dtype=np.int64)
        shifts = np.cumsum(sizes) - sizes
        return SequenceView(
            np.concatenate([part.tokens for part in parts] or [np.empty(0, dtype=np.int64)]),
            np.concatenate([part.starts + shift for part, shift in zip(parts, shifts, strict=True)] or [shifts]),
            np.concatenate([part.lengths for part in parts] or [shifts]),
        )

    def _is_dense(self) -> bool:
        return int(self.lengths.sum()) * _DENSE >= len(self.tokens)

    def _packed(self) -> SequenceView:
        return gather(self.tokens, self.starts, self.lengths).view()


def gather(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Sequences:
    """Copy sequences that lie anywhere in a flat array into one without gaps."""
    offsets = np.zeros(len(starts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    copied = np.empty(int(offsets[-1]), dtype=tokens.dtype)
    # Position p of the result comes from its sequence's start plus how far p is into the sequence.
    shift = starts - offsets[:-1]
    # Piece by piece: the positions of a whole window would not stay in cache.
    for row in range(0, len(starts), _ROWS_AT_ONCE):
        end = min(row + _ROWS_AT_ONCE, len(starts))
        here = slice(int(offsets[row]), int(offsets[end]))
        source = np.repeat(shift[row:end], lengths[row:end])
        source += np.arange(here.start, here.stop)
        np.take(tokens, source, out=copied[here], mode="clip")
    return Sequences(copied, offsets)
