"""What the manifest says of a data set, from the records of the stages that made it."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vae_dist.config.credentials import without_credentials
from vae_dist.data.prepare.lengths import length_facts
from vae_dist.data.prepare.work import Record
from vae_dist.data.source.sources import Source
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.shards import payload_schema
from vae_dist.data.text.tokenizer import Tokenizer
from vae_dist.errors import DataError

logger = logging.getLogger(__name__)


def make_manifest(
    source: Source, tokenizer: Tokenizer, encoded: Sequence[Record], shards: Mapping[str, Sequence[Record]]
) -> dict[str, Any]:
    """The manifest, without format version and hashes of the tables.

    Args:
        encoded: the record of every group, see `Encode`.
        shards: the records of the shards of every split, see `Assemble`.
    """
    options = source.options
    members = [sum(record["entry"]["members"] for record in records) for records in shards.values()]
    splits = {}
    for (name, records), first, count in zip(
        shards.items(), itertools.accumulate(members, initial=0), members, strict=False
    ):
        place = {"shards": len(records), "first_member": first, "members": count}
        splits[name] = _split_facts([record["splits"][name] for record in encoded], options.too_long) | place
    counts = _total(record["counts"] for record in encoded)
    schema = payload_schema(tokenizer.vocab_size, tokenizer.sha256)
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": str(schema.field("tokens").type.value_type),
        "splits": splits,
        "empty_texts": counts["empty_texts"],
        "filtered_texts": counts["filtered_texts"],
        "duplicate_texts": counts["duplicate_texts"],
        # Names and sizes only: paths and times differ between machines that hold the same data.
        "source": {"name": label(source), "files": [[Path(f.path).name, f.bytes] for f in source.files]},
        "options": options.model_dump(mode="json") | {"tokenizer": Path(options.tokenizer).name},
    }


def label(source: Source) -> str:
    """The last part of the source's name."""
    return Path(without_credentials(source.name).rstrip("/")).name


def no_training_sequence(source: Source, encoded: Sequence[Record]) -> DataError:
    """The error for a source of which nothing is left to train on."""
    splits = [facts for record in encoded for facts in record["splits"].values()]
    texts, too_long = (sum(facts[key] for facts in splits) for key in ("texts", "too_long"))
    counts = _total(record["counts"] for record in encoded)
    filtered = f", {counts['filtered_texts']} had no prepare.keyword in them" if counts["filtered_texts"] else ""
    return DataError(
        f"The source {source.name} gives no training sequence: {texts} texts were read, {too_long} of them longer "
        f"than prepare.max_tokens{filtered}. Check the files, the split fractions, prepare.max_tokens and "
        "prepare.too_long."
    )


def report(dataset: Dataset) -> Dataset:
    """Log what was made, a line a split."""
    for name, facts in dataset.manifest["splits"].items():
        parts = [f"{facts['sequences']:,} sequences", f"{facts['tokens']:,} tokens"]
        parts.append(f"{100 * facts['unknown_tokens'] / facts['tokens']:.2f} % unknown")
        parts += [f"{facts[key]:,} {key}" for key in ("truncated", "dropped", "split") if facts[key]]
        logger.info("%s: %s", name, ", ".join(parts))
    if "valid" not in dataset.splits:
        logger.info("no validation sequences: nothing will be validated on; --valid-fraction holds some out")
    return dataset


def _split_facts(groups: Sequence[Record], policy: str) -> dict[str, Any]:
    lengths = _total(dict(group["lengths"]) for group in groups)
    too_long = sum(group["too_long"] for group in groups)
    return {
        **length_facts(lengths),
        "texts": sum(group["texts"] for group in groups),
        "unknown_tokens": sum(group["unknown_tokens"] for group in groups),
        "truncated": too_long if policy == "truncate" else 0,
        "dropped": too_long if policy == "drop" else 0,
        "split": too_long if policy == "split" else 0,
    }


def _total(counts: Iterable[Mapping[Any, int]]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for some in counts:
        total.update(some)
    return total
