"""What is in a data set directory, for people: counts, a picture of the lengths, decoded text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc

from vae_dist.data.store.agreement import description_faults
from vae_dist.data.store.dataset import RESTORE, Dataset
from vae_dist.errors import DataError

_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_COUNTS = (
    "sequences",
    "tokens",
    "mean_tokens",
    "max_tokens",
    "unknown_rate",
    "truncated",
    "dropped",
    "split",
    "shards",
    "members",
)
_SPREAD = ("min", "mean", "max")


def describe(dataset: Dataset) -> dict[str, Any]:
    """Facts of every split, vocabulary and hashes, from the manifest and the tables; JSON-able.

    `unknown_rate` is a share of the tokens; `bytes` are the bytes of a split's shards; `tokens_per_shard` holds
    min, mean and max.

    Raises:
        DataError: a fact of the manifest is missing or of the wrong kind.
    """
    manifest = dataset.manifest
    if found := description_faults(manifest):
        raise DataError(f"{dataset.path}/manifest.json is damaged: {found[0]}. {RESTORE}")
    keys = ("vocab_size", "dtype", "tokenizer_sha256", "empty_texts", "duplicate_texts", "options")
    return {
        "path": dataset.path,
        "manifest_hash": dataset.manifest_hash,
        "source": manifest["source"]["name"],
        **{key: manifest[key] for key in keys},
        "splits": {name: _describe_split(dataset, name) for name in dataset.splits},
    }


def locate(dataset: Dataset, shard: str, index: int) -> tuple[str, int, int]:
    """Where a sequence stands that is known by its shard.

    Args:
        shard: file name, with or without `.tar`.
        index: number of the sequence in the shard.

    Returns:
        the split, the sequence's number in it, and how many sequences the shard holds from there on.

    Raises:
        DataError: there is no such shard, or no sequence `index` in it.
    """
    names = dataset.shards.column("name").to_pylist()
    wanted = f"{shard.removesuffix('.tar')}.tar"
    if wanted not in names:
        raise DataError(f"{dataset.path} has no shard {wanted}. Its shards are {names[0]} to {names[-1]}.")
    row = names.index(wanted)
    splits, counts = (dataset.shards.column(c).to_pylist() for c in ("split", "sequences"))
    if not 0 <= index < counts[row]:
        raise DataError(f"{wanted} has no sequence {index}. Choose one from 0 to {counts[row] - 1}.")
    before = sum(counts[i] for i in range(row) if splits[i] == splits[row])
    return splits[row], before + index, counts[row] - index


def preview(dataset: Dataset, split: str, first: int, count: int) -> list[str]:
    """Decoded text of the sequences [first, first + count), as far as they exist.

    Raises:
        DataError: there is no such split, or no sequence `first` in it.
    """
    chosen = dataset.split(split)
    if not 0 <= first < chosen.sequences:
        raise DataError(
            f"The {split} split of {dataset.path} has no sequence {first}. Choose one from 0 to {chosen.sequences - 1}."
        )
    stop = min(first + max(count, 0), chosen.sequences)
    return [dataset.tokenizer.decode(ids) for ids in chosen.read(first, stop - first)]


def length_histogram(dataset: Dataset, split: str) -> str:
    """A text picture: sequences by length in tokens."""
    return _histogram(split, dataset.manifest["splits"][split]["length_histogram"])


def render_info(facts: dict[str, Any]) -> str:
    """What `describe` returns as plain text: a table of the splits and a picture of the lengths of each."""
    splits = facts["splits"]
    head = [
        f"data set    {facts['path']}",
        f"source      {facts['source']}",
        f"vocabulary  {facts['vocab_size']:,} entries, stored as {facts['dtype']}",
        f"tokenizer   {facts['tokenizer_sha256'][:12]}",
        f"manifest    {facts['manifest_hash'][:12]}",
        f"left out    {facts['empty_texts']:,} empty texts, {facts['duplicate_texts']:,} duplicates",
    ]
    rows = [["", *splits]]
    rows += [[key.replace("_", " "), *(_cell(key, splits[s][key]) for s in splits)] for key in (*_COUNTS, "bytes")]
    spread = {s: splits[s]["tokens_per_shard"] for s in splits}
    rows += [[f"tokens per shard, {key}", *(f"{spread[s][key]:,.0f}" for s in splits)] for key in _SPREAD]
    pictures = [f"\n{_histogram(name, splits[name]['length_histogram'])}" for name in splits]
    return "\n".join([*head, "", *_table(rows), *pictures])


def _describe_split(dataset: Dataset, name: str) -> dict[str, Any]:
    facts = dataset.manifest["splits"][name]
    shards = dataset.shards.filter(pc.equal(dataset.shards.column("split"), name))
    members = dataset.index.column("tokens").slice(facts["first_member"], facts["members"]).to_numpy()
    # A shard's members stand together in the index; the first begins where those of the shard before it end.
    starts = np.cumsum(shards.column("members").to_numpy())[:-1]
    tokens = np.add.reduceat(members, np.concatenate([[0], starts]))
    return {
        **{key: value for key, value in facts.items() if key != "first_member"},
        "mean_tokens": facts["tokens"] / facts["sequences"],
        "unknown_rate": facts["unknown_tokens"] / facts["tokens"],
        "tokens_per_shard": {"min": int(tokens.min()), "mean": float(tokens.mean()), "max": int(tokens.max())},
        "bytes": pc.sum(shards.column("bytes")).as_py(),
    }


def _cell(key: str, value: float) -> str:
    if key == "unknown_rate":
        return f"{100 * value:.2f} %"
    return f"{value:,.1f}" if key == "mean_tokens" else f"{value:,}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _histogram(split: str, histogram: dict[str, Any]) -> str:
    width, counts = histogram["bin_tokens"], histogram["counts"]
    labels = [str(k + 1) if width == 1 else f"{k * width + 1}-{(k + 1) * width}" for k in range(len(counts))]
    bars = [_bar(count / max(counts)) for count in counts]
    rows = _table(
        [["", label, f"{n:,}", bar.ljust(_BAR_WIDTH)] for label, n, bar in zip(labels, counts, bars, strict=True)]
    )
    return "\n".join([f"{split}: sequences by length (tokens)", *rows])


def _bar(share: float) -> str:
    eighths = round(share * _BAR_WIDTH * 8)
    # Something is drawn for every count that is not zero.
    whole, rest = divmod(max(1, eighths) if share else 0, 8)
    return _EIGHTHS[8] * whole + _EIGHTHS[rest].strip()
