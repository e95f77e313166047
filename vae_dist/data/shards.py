"""Shards: WebDataset tars whose members are Arrow record batches of many sequences.

    train-000000.tar
      train-000000-00000000.arrow    one Arrow IPC stream, one record batch:  tokens list<uint16 | uint32>, doc int64

`tokens` are the tokens to predict, end of sequence last; the beginning of sequence is not stored. `doc` is the
number of the text in its split. The schema's metadata names the tokenizer. Stock `webdataset` and Ray Data read
these tars; this module reads single members by offset.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from vae_dist.data.sequences import Sequences
from vae_dist.errors import DataError

if TYPE_CHECKING:
    import webdataset

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

    def __init__(self, directory: Path, split: str, schema: pa.Schema, shard_bytes: int, member_sequences: int) -> None:
        self.members: list[MemberEntry] = []
        self.shards: list[ShardEntry] = []
        self._directory, self._split, self._schema = directory, split, schema
        self._shard_bytes, self._member_sequences = shard_bytes, member_sequences
        self._rows: list[np.ndarray] = []
        self._docs: list[int] = []
        self._tar: _Tar | None = None
        self._first_sequence = self._shard_members = self._shard_first_sequence = 0

    def add(self, tokens: np.ndarray, doc: int) -> None:
        """Append one sequence."""
        self._rows.append(tokens)
        self._docs.append(doc)
        if len(self._rows) == self._member_sequences:
            self._flush()

    def close(self) -> None:
        """Write what is left and finish the last shard."""
        if self._rows:
            self._flush()
        self._close_shard()

    def _flush(self) -> None:
        payload = encode_member(self._rows, self._docs, self._schema)
        if self._tar is not None and self._tar.offset + len(payload) > self._shard_bytes:
            self._close_shard()
        if self._tar is None:
            self._tar = _Tar(self._directory / self._shard_name())
        shard, count = len(self.shards), len(self._rows)
        offset = self._tar.write(f"{self._split}-{shard:06d}-{len(self.members):08d}", payload)
        tokens, crc32 = sum(map(len, self._rows)), zlib.crc32(payload)
        self.members.append(MemberEntry(shard, offset, len(payload), self._first_sequence, count, tokens, crc32))
        self._first_sequence += count
        self._shard_members += 1
        self._rows, self._docs = [], []

    def _shard_name(self) -> str:
        return f"{self._split}-{len(self.shards):06d}.tar"

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        path = self._directory / self._shard_name()
        sequences = self._first_sequence - self._shard_first_sequence
        self.shards.append(ShardEntry(path.name, path.stat().st_size, hash_file(path), self._shard_members, sequences))
        self._shard_members, self._shard_first_sequence = 0, self._first_sequence


class _Tar:
    """A tar file that knows where the bytes of its members begin."""

    def __init__(self, path: Path) -> None:
        # Imported here: webdataset imports torch, and readers need neither.
        import webdataset

        # A file, not its name, in which webdataset would look for URLs and pipes.
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115
        # Fixed owner, mode and time: the bytes of a shard depend on nothing but its sequences.
        self._writer: webdataset.TarWriter = webdataset.TarWriter(
            self._file, user="user", group="group", mode=0o444, mtime=0, encoder=False
        )
        self.offset = 0

    def write(self, key: str, payload: bytes) -> int:
        """Append a member; the offset of its payload in the file."""
        self._writer.write({"__key__": key, "arrow": payload})
        start = self.offset + _TAR_BLOCK
        self.offset = start + -(-len(payload) // _TAR_BLOCK) * _TAR_BLOCK
        return start

    def close(self) -> None:
        self._writer.close()
        self._file.close()


def encode_member(rows: list[np.ndarray], docs: list[int], schema: pa.Schema) -> bytes:
    """One Arrow IPC stream of one record batch."""
    sequences = Sequences.from_list(rows)
    values = pa.array(sequences.tokens, type=schema.field("tokens").type.value_type)
    tokens = pa.ListArray.from_arrays(pa.array(sequences.offsets, type=pa.int32()), values)
    batch = pa.record_batch([tokens, pa.array(docs, type=pa.int64())], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def decode_member(payload: pa.Buffer, entry: MemberEntry, schema: pa.Schema, where: Callable[[], str]) -> Sequences:
    """The sequences of a member from its bytes, checked against the index. Tokens are a view of `payload`.

    Args:
        schema: what `payload_schema` gives for the data set; the tokenizer in it must match.
        where: names shard, member and offset in errors.

    Raises:
        DataError: the bytes are not the ones that were written.
    """
    if payload.size != entry.bytes or zlib.crc32(payload) != entry.crc32:
        raise DataError(
            f"{where()} is damaged: its {payload.size} of {entry.bytes} bytes do not match the checksum in the "
            "index. Restore the shard from a copy, or delete the data set and prepare it again."
        )
    with pa.ipc.open_stream(payload) as stream:
        if not stream.schema.equals(schema, check_metadata=True):
            raise DataError(
                f"{where()} was written with another tokenizer or format than the manifest says. Restore the "
                "shards of this data set."
            )
        column = stream.read_next_batch().column(0)
    offsets = column.offsets.to_numpy().astype(np.int64)
    return Sequences(column.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])


def hash_file(path: Path) -> str:
    """xxh3 (128 bits, hex) of a file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
