"""What a loader read, in a form that does not depend on the order in which it read it.

A row's hash is the xxh3 of its ids as int64; the sum of all of them modulo 2^64 changes with any sequence that is
lost, read twice, cut or altered.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from peers.padding import PAD_ID, Padded


@dataclass(frozen=True)
class Content:
    """A multiset of sequences.

    Attributes:
        checksum: sum of the sequences' hashes modulo 2^64.
    """

    sequences: int
    tokens: int
    checksum: int

    def times(self, copies: int) -> Content:
        """The same multiset so many times over."""
        return Content(self.sequences * copies, self.tokens * copies, self.checksum * copies % 2**64)


def content_of(tokens: np.ndarray, offsets: np.ndarray) -> Content:
    """Of flat tokens; sequence i is tokens[offsets[i] : offsets[i + 1]]."""
    flat, bounds = tokens.astype(np.int64), offsets.tolist()
    pairs = itertools.pairwise(bounds)
    checksum = sum(xxhash.xxh3_64_intdigest(flat[first:end].data) for first, end in pairs)
    return Content(len(bounds) - 1, bounds[-1] - bounds[0], checksum % 2**64)


@dataclass(frozen=True)
class Pass:
    """One full pass of a contender.

    Attributes:
        positions: of all padded tensors, real and padding.
    """

    content: Content
    positions: int
    batches: int


def read_all(batches: Iterable[Padded], batch_sequences: int) -> Pass:
    """Read a pass to its end and look at every batch.

    Raises:
        ValueError: a batch has another dtype, shape or padding than was agreed, or more sequences than asked for.
    """
    sequences = tokens = checksum = positions = count = 0
    for tokens_BT, lengths_B in batches:
        lengths = _checked(tokens_BT, lengths_B, batch_sequences)
        rows = tokens_BT.contiguous().numpy()
        for row, length in zip(rows, lengths.tolist(), strict=True):
            checksum += xxhash.xxh3_64_intdigest(row[:length].data)
        sequences, tokens = sequences + len(lengths), tokens + int(lengths.sum())
        positions, count = positions + tokens_BT.numel(), count + 1
    return Pass(Content(sequences, tokens, checksum % 2**64), positions, count)


def _checked(tokens_BT: torch.Tensor, lengths_B: torch.Tensor, batch_sequences: int) -> np.ndarray:
    lengths = lengths_B.numpy()
    if tokens_BT.dtype != torch.int64 or lengths_B.dtype != torch.int64:
        raise ValueError(f"a batch holds {tokens_BT.dtype} and {lengths_B.dtype}, not int64")
    if tokens_BT.shape != (len(lengths), int(lengths.max())) or len(lengths) > batch_sequences:
        raise ValueError(f"a batch has shape {tuple(tokens_BT.shape)} for {len(lengths)} sequences")
    padding = np.arange(tokens_BT.shape[1]) >= lengths[:, None]
    if (tokens_BT.numpy()[padding] != PAD_ID).any():
        raise ValueError("a batch has tokens beyond the length of a sequence")
    return lengths
