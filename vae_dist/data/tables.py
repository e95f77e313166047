"""Writing index.arrow, shards.arrow and manifest.json of a data set directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from vae_dist.data.shards import FORMAT_VERSION, MemberEntry, ShardEntry, hash_file

_ARROW_TYPES = {"int": pa.int64(), "str": pa.string()}


def write_tables(
    directory: Path, members: Mapping[str, Sequence[MemberEntry]], shards: Mapping[str, Sequence[ShardEntry]]
) -> None:
    """Write index.arrow and shards.arrow, splits one after another in the given order."""
    _write_table(directory / "index.arrow", members, MemberEntry)
    _write_table(directory / "shards.arrow", shards, ShardEntry)


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """The commit point of a data set: until it is there, there is no data set."""
    hashes = {f"{name}_xxh3": hash_file(directory / f"{name}.arrow") for name in ("index", "shards")}
    write_json(directory / "manifest.json", {"format_version": FORMAT_VERSION, **manifest, **hashes})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, atomically and durably."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_table(path: Path, rows_of: Mapping[str, Sequence[Any]], row_type: type[Any]) -> None:
    rows = [{"split": split, **asdict(row)} for split, rows in rows_of.items() for row in rows]
    columns = [(f.name, _ARROW_TYPES[str(f.type)]) for f in fields(row_type)]
    schema = pa.schema([("split", pa.string()), *columns])
    table = pa.Table.from_pylist(rows, schema=schema).combine_chunks()
    with pa.ipc.new_file(str(path), schema) as writer:
        # One batch, so that a column is one contiguous piece of the memory map.
        writer.write_table(table, max_chunksize=max(1, len(rows)))
