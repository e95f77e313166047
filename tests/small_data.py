"""Small data sets built member by member, and members changed so that all hashes and tables still agree."""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import webdataset
import xxhash

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.lengths import length_facts
from vae_dist.data.prepare.tables import write_manifest, write_tables
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.filesystem import resolve
from vae_dist.data.store.folder import Folder
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.store.shards import MemberEntry, Shard, ShardEntry, build_shard, entry_bytes, payload_schema
from vae_dist.data.text.tokenizer import Tokenizer, build_tokenizer

Rows = Sequence[Sequence[int]]
Tables = dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]


def word_tokenizer(words: int = 60) -> Tokenizer:
    """A vocabulary of <pad> <s> </s> <unk> and so many words."""
    return build_tokenizer([" ".join(f"w{i}" for i in range(words))], PrepareConfig(tokenizer="word"))


def some_rows(count: int, seed: int, longest: int = 12, vocab_size: int = 64) -> list[list[int]]:
    """Random sequences that end as they must."""
    draw = np.random.default_rng(seed)
    return [[*draw.integers(3, vocab_size, draw.integers(0, longest)).tolist(), 2] for _ in range(count)]


def write_dataset(
    folder: Path,
    rows: Mapping[str, Rows],
    tokenizer: Tokenizer | None = None,
    docs: Mapping[str, Sequence[int]] | None = None,
    member_sequences: int = 7,
    members_in_shard: int = 3,
) -> Path:
    """A data set directory of these sequences, without `prepare`."""
    folder.mkdir(parents=True)
    tokenizer = tokenizer or word_tokenizer()
    tokenizer.save(folder / "tokenizer.json")
    schema = payload_schema(tokenizer.vocab_size, tokenizer.sha256)
    tables: Tables = {}
    for split, of_split in rows.items():
        numbers = np.array(docs[split] if docs else range(len(of_split)), dtype=np.int64)
        cut = [slice(i, i + member_sequences) for i in range(0, len(of_split), member_sequences)]
        members = [(Sequences.from_list([np.array(row) for row in of_split[c]]), numbers[c]) for c in cut]
        tables[split] = ([], [])
        for number, first in enumerate(range(0, len(members), members_in_shard)):
            held = members[first : first + members_in_shard]
            add_shard(folder, tables[split], build_shard(split, number, first, first * member_sequences, held, schema))
    splits = {
        name: {
            **length_facts(Counter(len(row) for row in of_split)),
            "texts": 1 + max(docs[name] if docs else range(len(of_split))),
            "unknown_tokens": sum(list(row).count(3) for row in of_split),
            "truncated": 0, "dropped": 0, "split": 0,
        }
        for name, of_split in rows.items()
    }  # fmt: skip
    options = PrepareConfig(tokenizer="word", member_sequences=member_sequences, shard_bytes=8192)
    manifest = {
        "tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "dtype": "uint16", "splits": splits,
        "empty_texts": 0, "filtered_texts": 0, "duplicate_texts": 0, "source": {"name": "rows", "files": []},
        "options": options.model_dump(mode="json"),
    }  # fmt: skip
    _finish(folder, manifest, tables)
    return folder


def add_shard(folder: Path, table: tuple[list[dict[str, Any]], list[dict[str, Any]]], shard: Shard) -> None:
    (folder / shard.entry.name).write_bytes(shard.data)
    table[0].extend(asdict(member) for member in shard.members)
    table[1].append(asdict(shard.entry))


def entries_of(folder: Path, split: str = "train") -> tuple[list[MemberEntry], list[ShardEntry]]:
    """A split's rows of the index and of the shard table."""
    members, shards = _tables(folder)[split]
    return [MemberEntry(**row) for row in members], [ShardEntry(**row) for row in shards]


def all_rows(folder: Path | str) -> dict[str, list[tuple[int, ...]]]:
    """Every split's sequences in order."""
    dataset = Dataset.open(folder, check_shards=False)
    splits = {name: dataset.split(name) for name in dataset.splits}
    return {name: [tuple(row.tolist()) for row in one.read(0, one.sequences)] for name, one in splits.items()}


def change_member(
    folder: Path, number: int, change: Callable[[pa.RecordBatch], pa.RecordBatch], split: str = "train"
) -> MemberEntry:
    """Put another record batch in a member's place and make all tables, hashes and totals fit. Returns its new row."""
    tables = _tables(folder)
    members, shards = tables[split]
    wanted = MemberEntry(**members[number])
    name = shards[wanted.shard]["name"]
    data = (folder / name).read_bytes()
    first = sum(row["members"] for row in shards[: wanted.shard])
    sink, offset = io.BytesIO(), 0
    with webdataset.TarWriter(sink, user="user", group="group", mode=0o444, mtime=0, encoder=False) as tar:
        for i in range(first, first + shards[wanted.shard]["members"]):
            row = MemberEntry(**members[i])
            payload = data[row.offset + 512 : row.offset + row.bytes]
            if i == number:
                with pa.ipc.open_stream(payload) as stream:
                    batch = change(stream.read_next_batch())
                buffer = pa.BufferOutputStream()
                with pa.ipc.new_stream(buffer, batch.schema) as writer:
                    writer.write_batch(batch)
                payload = buffer.getvalue().to_pybytes()
                row = replace(row, sequences=batch.num_rows, tokens=len(batch.column(0).flatten()))
            tar.write({"__key__": f"{split}-{row.shard:06d}-{i:08d}", "arrow": payload})
            members[i] = asdict(replace(row, offset=offset, bytes=entry_bytes(len(payload))))
            offset += members[i]["bytes"]
    data = sink.getvalue()
    (folder / name).write_bytes(data)
    for row in members[first:]:
        if row["shard"] == wanted.shard:
            row["crc32"] = zlib.crc32(data[row["offset"] : row["offset"] + row["bytes"]])
    shards[wanted.shard] |= {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"][split]["tokens"] = sum(row["tokens"] for row in members)
    _finish(folder, manifest, tables)
    return MemberEntry(**members[number])


def _tables(folder: Path) -> Tables:
    found: Tables = {}
    for place, name in enumerate(("index", "shards")):
        for row in pa.ipc.open_file(folder / f"{name}.arrow").read_all().to_pylist():
            found.setdefault(row.pop("split"), ([], []))[place].append(row)
    return found


def _finish(folder: Path, manifest: dict[str, Any], tables: Tables) -> None:
    out, first = Folder(*resolve(folder)), 0
    columns = {
        split: {f.name: [row[f.name] for row in members] for f in fields(MemberEntry)}
        for split, (members, _) in tables.items()
    }
    for split, (members, shards) in tables.items():
        manifest["splits"][split] |= {"shards": len(shards), "first_member": first, "members": len(members)}
        first += len(members)
    hashes = write_tables(out, columns, {split: shards for split, (_, shards) in tables.items()})
    manifest.pop("format_version", None)
    write_manifest(out, manifest | hashes)
