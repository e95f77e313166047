"""Whether manifest, tables and tokenizer of a data set tell the same story.

Damage to a table shows in its hash. The manifest has none, so every fact of it that decides what is read is compared
with what the tables say; `vae-dist data lint` recomputes the others (histogram, longest sequence) from the shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vae_dist.data.store.shards import MemberEntry, ShardEntry

_SPLIT_DESCRIPTIONS = ("texts", "unknown_tokens", "truncated", "dropped", "split")
_TEXT_COUNTS = ("empty_texts", "filtered_texts", "duplicate_texts")
# Hex digits.
_HASHES = {"tokenizer_sha256": 64, "index_xxh3": 32, "shards_xxh3": 32}
_SPLIT_COUNTS = ("sequences", "tokens", "max_tokens", "first_member", "members", "shards")


def manifest_faults(manifest: dict[str, Any]) -> list[str]:
    """What no writer of manifests writes: hashes that are no hashes, counts that are no counts. Empty: nothing."""
    hashes = ((key, re.compile(f"[0-9a-f]{{{digits}}}")) for key, digits in _HASHES.items())
    found = [f"{key} is no hash" for key, form in hashes if not form.fullmatch(str(manifest[key]))]
    if not _is_count(manifest["vocab_size"], least=1):
        found.append("vocab_size is no positive number")
    if not isinstance(manifest["splits"], dict) or not manifest["splits"]:
        return [*found, "splits holds no split"]
    for name, facts in manifest["splits"].items():
        if not isinstance(facts, dict):
            found.append(f"split {name!r} has no facts")
            continue
        # A split without sequences is left out, so everything but the place of the first member is at least 1.
        wrong = (k for k in _SPLIT_COUNTS if not _is_count(facts.get(k), least=int(k != "first_member")))
        found += [f"{key} of split {name!r} is no count" for key in wrong]
    return found


def description_faults(manifest: dict[str, Any]) -> list[str]:
    """What is missing or of the wrong kind among the facts that only people read.

    Args:
        manifest: without faults that matter for reading, see above.
    """
    source = manifest.get("source")
    named = isinstance(source, dict) and isinstance(source.get("name"), str)
    found = [] if named else ["source has no name"]
    found += [f"{key} is missing" for key in ("dtype", "options") if key not in manifest]
    found += [f"{key} is no count" for key in _TEXT_COUNTS if not _is_count(manifest.get(key), least=0)]
    for name, facts in manifest["splits"].items():
        wrong = [key for key in _SPLIT_DESCRIPTIONS if not _is_count(facts.get(key), least=0)]
        found += [f"{key} of split {name!r} is no count" for key in wrong]
        histogram, percentiles = facts.get("length_histogram"), facts.get("length_percentiles")
        if not isinstance(histogram, dict) or not _is_count(histogram.get("bin_tokens"), least=1):
            found.append(f"length_histogram of split {name!r} has no bin_tokens")
        elif not isinstance(histogram.get("counts"), list) or not any(histogram["counts"]):
            found.append(f"length_histogram of split {name!r} has no counts")
        elif not all(_is_count(count, least=0) for count in histogram["counts"]):
            found.append(f"length_histogram of split {name!r} holds something that is no count")
        if not isinstance(percentiles, dict):
            found.append(f"length_percentiles of split {name!r} is missing")
    return found


def table_faults(name: str, table: pa.Table) -> list[str]:
    """Whether a table is one of ours: its columns, and one contiguous piece.

    Args:
        name: `index` or `shards`.
    """
    row = MemberEntry if name == "index" else ShardEntry
    columns = ["split", *(f.name for f in fields(row))]
    if table.column_names != columns:
        return [f"{name}.arrow has the columns {', '.join(table.column_names)}, not {', '.join(columns)}"]
    texts = ("split", "name", "xxh3")
    wrong = [c for c in columns if table.schema.field(c).type != (pa.string() if c in texts else pa.int64())]
    found = [f"{name}.arrow has the wrong type in the column {c}" for c in wrong]
    if any(table.column(c).num_chunks != 1 or table.column(c).null_count for c in columns):
        found.append(f"{name}.arrow is empty, in several pieces, or has gaps")
    return found


def disagreements(manifest: dict[str, Any], index: pa.Table, shards: pa.Table, vocab_size: int) -> list[str]:
    """Every fact on which manifest, tables and tokenizer differ.

    Args:
        manifest, index, shards: without faults of their own, see above.
        vocab_size: of the tokenizer.
    """
    found = []
    if manifest["vocab_size"] != vocab_size:
        found.append(f"vocab_size is {manifest['vocab_size']} in the manifest and {vocab_size} in the tokenizer")
    runs = pc.run_end_encode(shards.column("split").chunk(0))
    in_table, ends = runs.values.to_pylist(), runs.run_ends.to_pylist()
    if list(manifest["splits"]) != in_table:
        return [*found, f"the manifest has the splits {_list(manifest['splits'])}, the shard table {_list(in_table)}"]
    return found + list(_count_faults(manifest["splits"], index, shards, ends))


def _count_faults(
    splits: dict[str, dict[str, Any]], index: pa.Table, shards: pa.Table, ends: list[int]
) -> Iterator[str]:
    first_member = 0
    for (name, facts), begin, end in zip(splits.items(), [0, *ends], ends, strict=False):
        rows = shards.slice(begin, end - begin)
        members, sequences = (pc.sum(rows.column(c)).as_py() for c in ("members", "sequences"))
        counted = {"shards": rows.num_rows, "first_member": first_member, "members": members, "sequences": sequences}
        mine = index.slice(first_member, members)
        if mine.num_rows < members or members < 1:
            yield f"the index ends before the {members} members of split {name!r}"
            return
        # One pass over one column: cheap beside hashing the file, which every opening does.
        counted["tokens"] = pc.sum(mine.column("tokens")).as_py()
        for key, value in counted.items():
            if facts[key] != value:
                yield f"{key} of split {name!r} is {facts[key]} in the manifest and {value} in the tables"
        last = mine.slice(members - 1).to_pylist()[0]
        if mine.column("first_sequence")[0].as_py() or last["first_sequence"] + last["sequences"] != sequences:
            yield f"the index does not number the sequences of split {name!r} from 0 to {sequences - 1}"
        first_member += members
    if index.num_rows != first_member:
        yield f"the index has {index.num_rows} rows for {first_member} members"


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _list(names: Any) -> str:
    return ", ".join(map(repr, names))
