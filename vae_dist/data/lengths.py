"""Sequence lengths: the policy for texts that are too long, and the counts that the manifest keeps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from vae_dist.data.special_ids import EOS_ID

_HISTOGRAM_BINS = 16


def fit_length(ids: np.ndarray, max_tokens: int, policy: str) -> list[np.ndarray]:
    """Apply the length policy to one encoded text whose last token is the end of sequence.

    Args:
        max_tokens: longest piece, its end of sequence included.
        policy: `truncate` keeps the first max_tokens - 1 tokens, `drop` nothing, `split` everything, in pieces of at
            most max_tokens - 1 tokens. Every piece ends with an end of sequence of its own.
    """
    if len(ids) <= max_tokens:
        return [ids]
    if policy == "drop":
        return []
    body, size = ids[:-1], max_tokens - 1
    starts = range(0, len(body) if policy == "split" else 1, size)
    return [np.append(body[start : start + size], EOS_ID) for start in starts]


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
