"""Sequence lengths: the policy for texts that are too long, and the counts that the manifest keeps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from vae_dist.data.store.sequences import Sequences, gather
from vae_dist.data.text.special_ids import EOS_ID

_HISTOGRAM_BINS = 16


def fit_lengths(texts: Sequences, max_tokens: int, policy: str) -> tuple[Sequences, np.ndarray]:
    """Apply the length policy to encoded texts, each of which ends with an end of sequence.

    Args:
        max_tokens: longest sequence, its end of sequence included.
        policy: for a longer text, `truncate` keeps the first max_tokens - 1 tokens, `drop` nothing, `split`
            everything, in pieces of at most max_tokens - 1 tokens. Every piece ends with an end of sequence.

    Returns:
        the sequences, and int64 the number of the text that each comes from.
    """
    lengths = texts.lengths
    if not len(lengths) or lengths.max() <= max_tokens:
        return texts, np.arange(len(lengths), dtype=np.int64)
    if policy == "drop":
        rows = np.flatnonzero(lengths <= max_tokens)
        return texts.take(rows), rows
    body, size = lengths - 1, max_tokens - 1
    pieces = np.maximum(1, -(-body // size)) if policy == "split" else np.ones(len(lengths), dtype=np.int64)
    rows = np.repeat(np.arange(len(lengths), dtype=np.int64), pieces)
    # Where a piece begins in its text: 0, size, 2 * size, ...
    begins = (np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * size
    sizes = np.minimum(body[rows] - begins, size) + 1
    fitted = gather(texts.tokens, texts.offsets[rows] + begins, sizes)
    fitted.tokens[fitted.offsets[1:] - 1] = EOS_ID
    return fitted, rows


def length_facts(lengths: Counter[int]) -> dict[str, Any]:
    """Totals, quantiles and a histogram of sequence lengths.

    Args:
        lengths: how many sequences have each length; not empty.

    Returns:
        sequences, tokens, max_tokens, length_percentiles (5, 50, 95), and length_histogram: `counts[k]` sequences
        have between k * bin_tokens + 1 and (k + 1) * bin_tokens tokens.
    """
    ordered = np.array(sorted(lengths), dtype=np.int64)
    counts = np.array([lengths[length] for length in ordered.tolist()], dtype=np.int64)
    longest, below = int(ordered[-1]), np.cumsum(counts)
    width = -(-longest // _HISTOGRAM_BINS)
    bins = np.bincount((ordered - 1) // width, weights=counts).astype(np.int64)
    percentiles = {str(p): int(ordered[np.searchsorted(below, p / 100 * below[-1])]) for p in (5, 50, 95)}
    return {
        "sequences": int(below[-1]),
        "tokens": int(ordered @ counts),
        "max_tokens": longest,
        "length_percentiles": percentiles,
        "length_histogram": {"bin_tokens": width, "counts": bins.tolist()},
    }
