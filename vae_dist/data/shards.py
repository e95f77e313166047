"""Shards: WebDataset tars whose members are Arrow record batches of many sequences.

    train-000000.tar
      train-000000-000000.arrow    one Arrow IPC stream, one record batch:  tokens list<uint16 | uint32>, doc int64

`tokens` are the tokens to predict, end of sequence last; the beginning of sequence is not stored. `doc` is the
number of the text in its split. The schema's metadata names the tokenizer. Stock `webdataset` and Ray Data read
these tars; this module reads single members by offset.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import webdataset
import xxhash

from vae_dist.data.sequences import Sequences
from vae_dist.errors import DataError

FORMAT_VERSION = 1
_TAR_BLOCK = 512
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class MemberEntry:
    """One tar member: where its bytes are and what they hold."""

    shard: int
    offset: int
    bytes: int
    first_sequence: int
    sequences: int
    tokens: int
    crc32: int


@dataclass(frozen=True)
class ShardEntry:
    """One tar file of a split."""

    name: str
    bytes: int
    xxh3: str
    members: int
    sequences: int


def token_type(vocab_size: int) -> pa.DataType:
    """The narrowest of uint16 and uint32 that holds every id."""
    return pa.uint16() if vocab_size <= 2**16 else pa.uint32()


def payload_schema(vocab_size: int, tokenizer_sha256: str) -> pa.Schema:
    """Schema of a member's record batch."""
    fields = [("tokens", pa.list_(token_type(vocab_size))), ("doc", pa.int64())]
    return pa.schema(fields, {"tokenizer_sha256": tokenizer_sha256, "format_version": str(FORMAT_VERSION)})


class ShardWriter:
    """Writes the shards of one split; the same sequences give the same bytes."""

    def __init__(
        self, directory: Path, split: str, schema: pa.Schema, shard_bytes: int, member_sequences: int
    ) -> None:
        self.members: list[MemberEntry] = []
        self.shards: list[ShardEntry] = []
        self._directory, self._split, self._schema = directory, split, schema
        self._shard_bytes, self._member_sequences = shard_bytes, member_sequences
        self._rows: list[np.ndarray] = []
        self._docs: list[int] = []
        self._tar: webdataset.TarWriter | None = None
        self._offset = self._first_sequence = 0

    def add(self, tokens: np.ndarray, doc: int) -> None:
        """Append one sequence."""
        self._rows.append(tokens)
        self._docs.append(doc)
        if len(self._rows) == self._member_sequences:
            self._flush()

    def close(self) -> None:
        """Write what is left and finish the last shard."""
        self._flush()
        self._close_shard()

    def _flush(self) -> None:
        if not self._rows:
            return
        payload = self._payload()
        if self._tar is not None and self._offset + len(payload) > self._shard_bytes:
            self._close_shard()
        if self._tar is None:
            self._open_shard()
        count, tokens = len(self._rows), sum(map(len, self._rows))
        key = f"{self._split}-{len(self.shards):06d}-{len(self.members):08d}"
        self._tar.write({"__key__": key, "arrow": payload})
        entry = MemberEntry(
            len(self.shards), self._offset + _TAR_BLOCK, len(payload), self._first_sequence, count, tokens,
            zlib.crc32(payload),
        )
        self.members.append(entry)
        self._offset += _TAR_BLOCK + -(-len(payload) // _TAR_BLOCK) * _TAR_BLOCK
        self._first_sequence += count
        self._rows, self._docs = [], []

    def _payload(self) -> bytes:
        sequences = Sequences.from_list(self._rows)
        values = pa.array(sequences.tokens, type=self._schema.field("tokens").type.value_type)
        tokens = pa.ListArray.from_arrays(pa.array(sequences.offsets, type=pa.int32()), values)
        batch = pa.record_batch([tokens, pa.array(self._docs, type=pa.int64())], schema=self._schema)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema) as stream:
            stream.write_batch(batch)
        return sink.getvalue().to_pybytes()

    def _open_shard(self) -> None:
        path = str(self._directory / f"{self._split}-{len(self.shards):06d}.tar")
        # Fixed owner, mode and time: the bytes of a shard depend on nothing but its sequences.
        self._tar = webdataset.TarWriter(path, user="user", group="group", mode=0o444, mtime=0, encoder=False)

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar, self._offset = None, 0
        path = self._directory / f"{self._split}-{len(self.shards):06d}.tar"
        mine = [m for m in self.members if m.shard == len(self.shards)]
        self.shards.append(
            ShardEntry(path.name, path.stat().st_size, hash_file(path), len(mine), sum(m.sequences for m in mine))
        )


def read_member(buffer: pa.Buffer, entry: MemberEntry, where: str, schema: pa.Schema) -> Sequences:
    """The sequences of a member from its bytes, checked against the index.

    Args:
        where: names shard and offset in errors.
        schema: what `payload_schema` gives for the data set; the tokenizer in it must match.

    Raises:
        DataError: the bytes are not the ones that were written.
    """
    if buffer.size != entry.bytes or zlib.crc32(buffer) != entry.crc32:
        raise DataError(
            f"{where} is damaged: its {buffer.size} bytes do not match the checksum in the index. Restore the shard "
            "from a copy, or prepare the data set again."
        )
    with pa.ipc.open_stream(buffer) as stream:
        if not stream.schema.equals(schema, check_metadata=True):
            raise DataError(
                f"{where} was written for another tokenizer or format: its schema is {stream.schema}. Restore the "
                "shard of this data set."
            )
        column = stream.read_next_batch().column(0)
    offsets = column.offsets.to_numpy().astype(np.int64)
    return Sequences(column.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])


def iter_docs(buffer: pa.Buffer) -> Iterator[int]:
    """The `doc` column of a member."""
    with pa.ipc.open_stream(buffer) as stream:
        yield from stream.read_next_batch().column(1).to_pylist()


def hash_file(path: Path) -> str:
    """xxh3 (128 bits, hex) of a file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
