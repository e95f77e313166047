"""Shards: WebDataset tars whose members are Arrow record batches of many sequences.

    train-000000.tar
      train-000000-00000000.arrow    one Arrow IPC stream, one record batch:  tokens list<uint16 | uint32>, doc int64

`tokens` are the tokens to predict, end of sequence last; the beginning of sequence is not stored. `doc` is the
number of the text in its split. The schema's metadata names the tokenizer. Stock `webdataset` and Ray Data read
these tars; this module also reads single members by offset.

The index keeps a checksum of a member's whole entry, tar header and padding included: tar readers take a damaged
header for the end of the archive and say nothing.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from vae_dist.data.store.sequences import Sequences
from vae_dist.errors import DataError

FORMAT_VERSION = 2
TAR_BLOCK = 512
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class MemberEntry:
    """One tar member: where its entry lies in the shard and what it holds.

    Attributes:
        shard: number of the shard in its split.
        offset, bytes: of the entry: tar header, payload, padding to a whole block.
        first_sequence: number of its first sequence in the split.
        sequences, tokens: how many it holds.
        crc32: of the entry's bytes.
    """

    shard: int
    offset: int
    bytes: int
    first_sequence: int
    sequences: int
    tokens: int
    crc32: int


@dataclass(frozen=True)
class ShardEntry:
    """One tar file of a split; `xxh3` is the 128-bit hash of the file, in hex."""

    name: str
    bytes: int
    xxh3: str
    members: int
    sequences: int


@dataclass(frozen=True)
class Shard:
    """A whole tar in memory and its rows of the two tables."""

    data: bytes
    entry: ShardEntry
    members: list[MemberEntry]


def token_type(vocab_size: int) -> pa.DataType:
    """The narrowest of uint16 and uint32 that holds every id."""
    return pa.uint16() if vocab_size <= 2**16 else pa.uint32()


def payload_schema(vocab_size: int, tokenizer_sha256: str) -> pa.Schema:
    """Schema of a member's record batch."""
    fields = [("tokens", pa.list_(token_type(vocab_size))), ("doc", pa.int64())]
    return pa.schema(fields, {"tokenizer_sha256": tokenizer_sha256, "format_version": str(FORMAT_VERSION)})


def entry_bytes(payload_bytes: int) -> int:
    """Bytes that a member takes in a tar: header, payload, padding to a whole block."""
    return TAR_BLOCK + -(-payload_bytes // TAR_BLOCK) * TAR_BLOCK


def shard_name(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:06d}.tar"


def build_shard(
    split: str,
    number: int,
    first_member: int,
    first_sequence: int,
    members: Iterable[tuple[Sequences, np.ndarray]],
    schema: pa.Schema,
) -> Shard:
    """A shard from its members' sequences and doc numbers; the same input gives the same bytes.

    Args:
        number: of the shard in its split.
        first_member, first_sequence: numbers, in the split, of the first member and of its first sequence.
        members: sequences and int64 doc numbers of each member.
        schema: from `payload_schema`.
    """
    # Imported here: webdataset imports torch, and readers need neither.
    import webdataset

    sink, entries = io.BytesIO(), []
    offset, start = 0, first_sequence
    # Fixed owner, mode and time: the bytes of a shard depend on nothing but its sequences.
    with webdataset.TarWriter(sink, user="user", group="group", mode=0o444, mtime=0, encoder=False) as tar:
        for member, (sequences, docs) in enumerate(members, first_member):
            payload = encode_member(sequences, docs, schema)
            tar.write({"__key__": f"{split}-{number:06d}-{member:08d}", "arrow": payload})
            size = entry_bytes(len(payload))
            entries.append(MemberEntry(number, offset, size, start, len(sequences), len(sequences.tokens), 0))
            offset, start = offset + size, start + len(sequences)
    data = sink.getvalue()
    view = memoryview(data)
    checked = [replace(e, crc32=zlib.crc32(view[e.offset : e.offset + e.bytes])) for e in entries]
    digest = xxhash.xxh3_128_hexdigest(data)
    entry = ShardEntry(shard_name(split, number), len(data), digest, len(entries), start - first_sequence)
    return Shard(data, entry, checked)


def encode_member(sequences: Sequences, docs: np.ndarray, schema: pa.Schema) -> bytes:
    """The Arrow IPC stream of one record batch."""
    kind = schema.field("tokens").type
    values = pa.array(sequences.tokens.astype(kind.value_type.to_pandas_dtype(), copy=False))
    tokens = pa.ListArray.from_arrays(pa.array(sequences.offsets, type=pa.int32()), values, type=kind)
    batch = pa.record_batch([tokens, pa.array(docs, type=pa.int64())], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


class Decoder:
    """Decodes the members of one data set and refuses whatever is not what was written."""

    def __init__(self, schema: pa.Schema, vocab_size: int) -> None:
        self._schema, self._vocab_size = schema, vocab_size

    def __call__(self, data: pa.Buffer, entry: MemberEntry, where: Callable[[], str]) -> Sequences:
        """The sequences of a member from its entry's bytes. Tokens are a view of `data`.

        Args:
            where: names shard, member and offset in errors.

        Raises:
            DataError: the bytes are not the ones that were written, or do not fit the data set.
        """
        if data.size != entry.bytes or zlib.crc32(data) != entry.crc32:
            raise DataError(
                f"{where()} is damaged: its {data.size} of {entry.bytes} bytes do not match the checksum in the "
                "index. Restore the shard from a copy, or delete the data set and prepare it again."
            )
        try:
            with pa.ipc.open_stream(data.slice(TAR_BLOCK)) as stream:
                if not stream.schema.equals(self._schema, check_metadata=True):
                    raise DataError(
                        f"{where()} was written with another tokenizer or format than the manifest says. Restore the "
                        "shards of this data set."
                    )
                column = stream.read_next_batch().column(0)
        except (pa.ArrowException, StopIteration) as error:
            raise DataError(f"{where()} is no Arrow record batch: {error}. Prepare the data again.") from None
        offsets = column.offsets.to_numpy().astype(np.int64)
        tokens = column.values.to_numpy()[offsets[0] : offsets[-1]]
        self._check(tokens, offsets, entry, where)
        return Sequences(tokens, offsets - offsets[0])

    def _check(self, tokens: np.ndarray, offsets: np.ndarray, entry: MemberEntry, where: Callable[[], str]) -> None:
        if (len(offsets) - 1, len(tokens)) != (entry.sequences, entry.tokens):
            raise DataError(
                f"{where()} holds {len(offsets) - 1} sequences and {len(tokens)} tokens; the index says "
                f"{entry.sequences} and {entry.tokens}. Restore the data set, or prepare it again."
            )
        # A sequence of no token stands for one that was left out; see `Split.read`.
        if (np.diff(offsets) < 1).any():
            raise DataError(f"{where()} holds a sequence without a token. Prepare the data again.")
        if len(tokens) and int(tokens.max()) >= self._vocab_size:
            raise DataError(
                f"{where()} holds the token {int(tokens.max())}, outside the vocabulary of {self._vocab_size}. "
                "Prepare the data again with this data set's tokenizer."
            )


def member_docs(data: pa.Buffer) -> np.ndarray:
    """int64 doc numbers of a member's sequences, from the bytes of its entry, which a `Decoder` has passed."""
    with pa.ipc.open_stream(data.slice(TAR_BLOCK)) as stream:
        return stream.read_next_batch().column(1).to_numpy()


def hash_file(path: Path) -> str:
    """xxh3 (128 bits, hex) of a file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
