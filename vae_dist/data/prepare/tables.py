"""Writing index.arrow, shards.arrow and manifest.json of a data set directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import pyarrow as pa
import xxhash

from vae_dist.data.store.folder import Folder
from vae_dist.data.store.shards import FORMAT_VERSION, MemberEntry, ShardEntry

_ARROW_TYPES = {"int": pa.int64(), "str": pa.string()}


def write_tables(
    out: Folder, members: Mapping[str, Mapping[str, Sequence[Any]]], shards: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, str]:
    """Write index.arrow and shards.arrow, splits one after another in the given order.

    Args:
        members: for each split the columns of its rows of the index, named as in MemberEntry.
        shards: for each split its rows of the shard table, see ShardEntry.

    Returns:
        the manifest's entries for them: 128-bit xxh3 in hex.
    """
    columns = {
        split: {f.name: [row[f.name] for row in rows] for f in fields(ShardEntry)} for split, rows in shards.items()
    }
    hashes = {}
    for name, data in (("index", _table_bytes(members, MemberEntry)), ("shards", _table_bytes(columns, ShardEntry))):
        out.write(f"{name}.arrow", data)
        hashes[f"{name}_xxh3"] = xxhash.xxh3_128_hexdigest(data)
    return hashes


def write_manifest(out: Folder, manifest: dict[str, Any]) -> None:
    """The commit point of a data set: until it is there, there is no data set.

    Args:
        manifest: with what `write_tables` returned.
    """
    out.write_json("manifest.json", {"format_version": FORMAT_VERSION, **manifest}, indent=1)


def _table_bytes(columns_of: Mapping[str, Mapping[str, Sequence[Any]]], row_type: type[Any]) -> pa.Buffer:
    kinds = {f.name: _ARROW_TYPES[str(f.type)] for f in fields(row_type)}
    schema = pa.schema([("split", pa.string()), *kinds.items()])
    tables = []
    for split, columns in columns_of.items():
        arrays = [pa.array(columns[name], type=kind) for name, kind in kinds.items()]
        tables.append(pa.table([pa.repeat(split, len(arrays[0])), *arrays], schema=schema))
    table = pa.concat_tables(tables).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        # One batch, so that a column is one contiguous piece of the memory map.
        writer.write_table(table, max_chunksize=max(1, table.num_rows))
    return sink.getvalue()
