"""Shards: bytes that do not change, offsets that a tar reader agrees with, damage that is noticed."""

import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset

from vae_dist.data.store.sequences import Sequences
from vae_dist.data.store.shards import (
    Decoder,
    MemberEntry,
    ShardEntry,
    build_shard,
    hash_file,
    payload_schema,
    token_type,
)
from vae_dist.errors import DataError

SCHEMA = payload_schema(1000, "tokenizer-hash")


def rows(count: int, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [np.append(draw.integers(4, 1000, draw.integers(0, 30)), 2) for _ in range(count)]


@dataclass
class Written:
    """The rows of the two tables for what was written."""

    shards: list[ShardEntry] = field(default_factory=list)
    members: list[MemberEntry] = field(default_factory=list)


def write(folder: Path, sequences: list[np.ndarray], schema: pa.Schema = SCHEMA, member_sequences: int = 7) -> Written:
    """Shards of ten members each."""
    folder.mkdir(exist_ok=True)
    written, size = Written(), 10 * member_sequences
    for number, first in enumerate(range(0, len(sequences), size)):
        here = range(first, min(first + size, len(sequences)))
        members = [
            (Sequences.from_list([sequences[i] for i in part]), np.array(part))
            for part in (here[i : i + member_sequences] for i in range(0, len(here), member_sequences))
        ]
        shard = build_shard("train", number, len(written.members), first, members, schema)
        (folder / shard.entry.name).write_bytes(shard.data)
        written.shards.append(shard.entry)
        written.members += shard.members
    return written


def test_index_agrees_with_tarfile(tmp_path: Path) -> None:
    writer = write(tmp_path, rows(200))
    assert len(writer.shards) > 2
    found = []
    for number, shard in enumerate(writer.shards):
        with tarfile.open(tmp_path / shard.name) as tar:
            for info in tar:
                size = info.offset_data - info.offset + -(-info.size // 512) * 512
                entry = (tmp_path / shard.name).read_bytes()[info.offset : info.offset + size]
                found.append((number, info.offset, size, zlib.crc32(entry)))
                assert (info.mtime, info.mode, info.uname, info.gname) == (0, 0o444, "user", "group")
    assert found == [(m.shard, m.offset, m.bytes, m.crc32) for m in writer.members]


def test_index_counts(tmp_path: Path) -> None:
    sequences = rows(200)
    writer = write(tmp_path, sequences)
    lengths = np.array([len(row) for row in sequences])
    assert [m.first_sequence for m in writer.members] == list(range(0, 200, 7))
    assert [m.sequences for m in writer.members] == [7] * 28 + [4]
    assert [m.tokens for m in writer.members] == [lengths[i : i + 7].sum() for i in range(0, 200, 7)]
    for number, shard in enumerate(writer.shards):
        mine = [m for m in writer.members if m.shard == number]
        assert (shard.members, shard.sequences) == (len(mine), sum(m.sequences for m in mine))
        path = tmp_path / shard.name
        assert (shard.bytes, shard.xxh3) == (path.stat().st_size, hash_file(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"train-{i:06d}.tar" for i in range(len(writer.shards))]


def test_bytes_are_reproducible(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, rows(100)) for name in ("a", "b"))
    assert first.shards == second.shards
    other = write(tmp_path / "c", rows(100, seed=1))
    assert [s.xxh3 for s in other.shards] != [s.xxh3 for s in first.shards]


@pytest.mark.parametrize(
    ("vocab_size", "kind"), [(65_536, pa.uint16()), (65_537, pa.uint32()), (2**31 - 1, pa.uint32())]
)
def test_every_id_fits(tmp_path: Path, vocab_size: int, kind: pa.DataType) -> None:
    assert token_type(vocab_size) == kind
    schema = payload_schema(vocab_size, "h")
    writer = write(tmp_path, [np.array([vocab_size - 1, 2])], schema)
    assert read(tmp_path, writer, 0, schema).tokens.tolist() == [vocab_size - 1, 2]


def test_payload_is_plain_arrow(tmp_path: Path) -> None:
    sequences = rows(9)
    write(tmp_path, sequences, member_sequences=9)
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        payload = tar.extractfile(tar.next()).read()
    with pa.ipc.open_stream(payload) as stream:
        table = stream.read_all()
    assert table.schema.metadata == {b"tokenizer_sha256": b"tokenizer-hash", b"format_version": b"2"}
    assert table.column("tokens").to_pylist() == [row.tolist() for row in sequences]
    assert table.column("doc").to_pylist() == list(range(9))


def test_stock_webdataset_reads_shards(tmp_path: Path) -> None:
    sequences = rows(200)
    writer = write(tmp_path, sequences)
    urls = [str(tmp_path / shard.name) for shard in writer.shards]

    def arrow(key: str, data: bytes) -> list[list[int]] | None:
        return pa.ipc.open_stream(data).read_all().column("tokens").to_pylist() if key.endswith("arrow") else None

    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode(arrow, only=["arrow"]))
    assert [row for sample in samples for row in sample["arrow"]] == [row.tolist() for row in sequences]
    assert len({sample["__key__"] for sample in samples}) == len(writer.members)


def read(
    folder: Path, writer: Written, number: int, schema: pa.Schema = SCHEMA, flip: int = -1, vocab_size: int = 2**31
) -> Sequences:
    entry = writer.members[number]
    data = bytearray((folder / writer.shards[entry.shard].name).read_bytes()[entry.offset : entry.offset + entry.bytes])
    if flip >= 0:
        data[flip] ^= 1
    where = "train-000000.tar, member 3 at byte 512,"
    return Decoder(schema, vocab_size)(pa.py_buffer(bytes(data)), entry, lambda: where)


def test_members_decode_to_what_was_written(tmp_path: Path) -> None:
    sequences = rows(50)
    writer = write(tmp_path, sequences)
    decoded = [row.tolist() for number in range(len(writer.members)) for row in read(tmp_path, writer, number)]
    assert decoded == [row.tolist() for row in sequences]
    member = read(tmp_path, writer, 1)
    assert member.offsets.dtype == np.int64
    assert member.tokens.dtype == np.uint16
    assert not member.tokens.flags.owndata


def test_damage_is_named(tmp_path: Path) -> None:
    writer = write(tmp_path, rows(50))
    for flip in range(0, writer.members[2].bytes, 97):
        with pytest.raises(DataError, match=r"train-000000\.tar, member 3 at byte 512, is damaged"):
            read(tmp_path, writer, 2, flip=flip)
    entry = writer.members[0]
    with pytest.raises(DataError, match="its 0 of"):
        Decoder(SCHEMA, 1000)(pa.py_buffer(b""), entry, lambda: "x")


@pytest.mark.parametrize("schema", [payload_schema(1000, "other"), payload_schema(70_000, "tokenizer-hash")])
def test_another_tokenizer_is_refused(tmp_path: Path, schema: pa.Schema) -> None:
    writer = write(tmp_path, rows(5))
    with pytest.raises(DataError, match="member 3 at byte 512, was written with another tokenizer or format"):
        read(tmp_path, writer, 0, schema)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    writer = write(tmp_path, [np.array([4, 999, 2])])
    assert read(tmp_path, writer, 0, vocab_size=1000).tokens.tolist() == [4, 999, 2]
    with pytest.raises(DataError, match="holds the token 999, outside the vocabulary of 999"):
        read(tmp_path, writer, 0, vocab_size=999)
