"""What is in a data set directory, for people: counts, a picture of the lengths, decoded text."""

from __future__ import annotations

from typing import Any

import numpy as np

from vae_dist.data.dataset import Dataset

_HISTOGRAM_SEQUENCES = 100_000
_BINS, _BAR_WIDTH = 12, 40


def describe(dataset: Dataset) -> dict[str, Any]:
    """Counts of every split, vocabulary and hashes, and length percentiles of the first 100,000 sequences."""
    splits = {}
    for name in dataset.splits:
        facts = {k: v for k, v in dataset.manifest["splits"][name].items() if k not in ("first_member", "members")}
        lengths = _lengths(dataset, name)
        facts["length_percentiles"] = {str(p): int(np.percentile(lengths, p)) for p in (5, 50, 95)}
        splits[name] = facts
    return {
        "path": dataset.path,
        "vocab_size": dataset.tokenizer.vocab_size,
        "dtype": dataset.manifest["dtype"],
        "tokenizer_sha256": dataset.manifest["tokenizer_sha256"],
        "manifest_hash": dataset.manifest_hash,
        "source": dataset.manifest["origin"]["source"],
        "splits": splits,
    }


def length_histogram(dataset: Dataset, split: str) -> str:
    """A text picture: sequences by length in tokens."""
    counts, edges = np.histogram(_lengths(dataset, split), bins=_BINS)
    scale = _BAR_WIDTH / max(1, counts.max())
    rows = [
        f"{int(np.ceil(low)):>5} - {int(np.floor(high)):>5}  {'#' * round(count * scale):<{_BAR_WIDTH}} {count:,}"
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]
    return "\n".join([f"{split}: sequences by length (tokens)", *rows])


def preview(dataset: Dataset, split: str, first: int, count: int) -> list[str]:
    """Decoded text of the sequences [first, first + count), as far as they exist."""
    chosen = dataset.split(split)
    stop = min(first + count, chosen.sequences)
    return [dataset.tokenizer.decode(ids) for ids in chosen.read(first, stop - first)] if first < stop else []


def _lengths(dataset: Dataset, name: str) -> np.ndarray:
    split = dataset.split(name)
    return split.read(0, min(split.sequences, _HISTOGRAM_SEQUENCES)).lengths
