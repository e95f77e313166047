"""Stage `encode`: a group's texts become token sequences in one work file.

The file is a row of blocks, each a run of neighbouring sequences of one split: their doc numbers (int64, counted in
the group), lengths (uint32), and tokens (the data set's type), one array after the other. The record says where the
blocks are. A block is written as soon as it is full, so memory does not grow with the group.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import numpy as np

from vae_dist.data.prepare.deduplicate import Drops
from vae_dist.data.prepare.lengths import fit_lengths
from vae_dist.data.prepare.texts import SPLITS, batches_of
from vae_dist.data.prepare.work import Record
from vae_dist.data.source.pieces import Piece
from vae_dist.data.source.sources import Source
from vae_dist.data.store.folder import Folder
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.store.shards import token_type
from vae_dist.data.text.special_ids import UNK_ID
from vae_dist.data.text.tokenizer import Tokenizer
from vae_dist.errors import DataError

STAGE = "encode"
TOKENIZER_FILE = "tokenizer.json"
_BLOCK_TOKENS = 1 << 20
# Texts given to the tokenizer at a time. Its encodings, about a hundred bytes a token, stay in cache: byte-level BPE
# takes a sixth longer for four thousand.
_ENCODED_AT_ONCE = 256


class Block(NamedTuple):
    """Where a run of sequences of one split lies in a group's work file, and the CRC-32 of its bytes."""

    offset: int
    sequences: int
    tokens: int
    crc32: int


@dataclass(frozen=True)
class Encode:
    """The stage's function. The tokenizer lies in the work folder."""

    source: Source
    work: Folder
    drops: Drops | None

    def __call__(self, number: int, pieces: Sequence[Piece]) -> Record:
        """Write a group's blocks.

        Returns:
            texts; counts of what was left out; and, for every split, texts, unknown_tokens, too_long, blocks and
            lengths: [length, sequences] pairs.
        """
        tokenizer = _tokenizer(self.work.read(TOKENIZER_FILE))
        counts: Counter[str] = Counter()
        dropped = self.drops.of_group(number) if self.drops else None
        with self.work.writing(block_file(number)) as stream:
            sink = BlockWriter(stream, token_dtype(tokenizer.vocab_size))
            options = self.source.options
            writers = {name: _SplitWriter(sink, options.max_tokens, options.too_long) for name in SPLITS}
            for batch in batches_of(self.source, pieces, counts, dropped):
                encoded = _encoded(tokenizer, batch.texts)
                for code, name in enumerate(SPLITS):
                    rows = np.flatnonzero(batch.splits == code)
                    if len(rows):
                        writers[name].add(encoded if len(rows) == len(batch) else encoded.take(rows))
            for writer in writers.values():
                writer.flush()
        return {
            "texts": sum(writer.texts for writer in writers.values()),
            "counts": dict(counts),
            "splits": {name: writer.record() for name, writer in writers.items()},
        }


def block_file(group: int) -> str:
    """Name of a group's work file."""
    return f"{STAGE}-{group:06d}.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of a data set's tokens, little-endian."""
    return np.dtype(token_type(vocab_size).to_pandas_dtype()).newbyteorder("<")


def read_block(read: Callable[[int, int], bytes], block: Block, dtype: np.dtype) -> tuple[Sequences, np.ndarray]:
    """The sequences of a block and their doc numbers.

    Args:
        read: reads bytes of the work file, see `Folder.opened`.

    Raises:
        DataError: they are not the bytes that were written.
    """
    docs_bytes, lengths_bytes = 8 * block.sequences, 4 * block.sequences
    data = read(block.offset, docs_bytes + lengths_bytes + dtype.itemsize * block.tokens)
    if zlib.crc32(data) != block.crc32:
        raise DataError(
            f"The {len(data)} bytes from {block.offset} on of a work file are not the ones that were written. Check "
            "the storage, delete the unfinished data set and prepare it again."
        )
    docs = np.frombuffer(data, dtype="<i8", count=block.sequences)
    lengths = np.frombuffer(data, dtype="<u4", count=block.sequences, offset=docs_bytes)
    tokens = np.frombuffer(data, dtype=dtype, offset=docs_bytes + lengths_bytes)
    return Sequences(tokens, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])), docs


@lru_cache(maxsize=1)
def _tokenizer(file_bytes: bytes) -> Tokenizer:
    """Parsed once a process."""
    return Tokenizer(file_bytes)


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> Sequences:
    parts = [tokenizer.encode_flat(texts[i : i + _ENCODED_AT_ONCE]) for i in range(0, len(texts), _ENCODED_AT_ONCE)]
    tokens, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Sequences(tokens, np.concatenate([[0], np.cumsum(lengths)]))


class BlockWriter:
    """Appends arrays to a work file."""

    def __init__(self, stream: BinaryIO, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._stream, self._offset = stream, 0

    def append(self, docs: np.ndarray, sequences: Sequences) -> Block:
        """Write one block; says where."""
        offset, crc32 = self._offset, 0
        for values, dtype in ((docs, "<i8"), (sequences.lengths, "<u4"), (sequences.tokens, self.dtype)):
            data = values.astype(dtype, copy=False).tobytes()
            self._stream.write(data)
            self._offset += len(data)
            crc32 = zlib.crc32(data, crc32)
        return Block(offset, len(sequences), len(sequences.tokens), crc32)


class _SplitWriter:
    """A split's blocks and counts in one group while they grow."""

    def __init__(self, sink: BlockWriter, max_tokens: int, policy: str) -> None:
        self._sink, self._max_tokens, self._policy = sink, max_tokens, policy
        self.texts = self._unknown_tokens = self._too_long = self._held_tokens = 0
        self._lengths: Counter[int] = Counter()
        self._blocks: list[Block] = []
        self._held: list[Sequences] = []
        self._held_docs: list[np.ndarray] = []

    def add(self, texts: Sequences) -> None:
        """Append encoded texts."""
        self._too_long += int(np.count_nonzero(texts.lengths > self._max_tokens))
        fitted, rows = fit_lengths(texts, self._max_tokens, self._policy)
        lengths, counts = np.unique(fitted.lengths, return_counts=True)
        self._lengths.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        self._unknown_tokens += int(np.count_nonzero(fitted.tokens == UNK_ID))
        self._held.append(Sequences(fitted.tokens.astype(self._sink.dtype), fitted.offsets))
        self._held_docs.append(rows + self.texts)
        self._held_tokens += len(fitted.tokens)
        self.texts += len(texts)
        if self._held_tokens >= _BLOCK_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if any(len(part) for part in self._held):
            block = self._sink.append(np.concatenate(self._held_docs), Sequences.concatenate(self._held))
            self._blocks.append(block)
        self._held, self._held_docs, self._held_tokens = [], [], 0

    def record(self) -> Record:
        """See `Encode`."""
        return {
            "texts": self.texts,
            "unknown_tokens": self._unknown_tokens,
            "too_long": self._too_long,
            "lengths": sorted(self._lengths.items()),
            "blocks": self._blocks,
        }
