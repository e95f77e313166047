"""What generated text looks like beside the training text: diversity and copying; perplexities per token and word."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import xxhash

_ID = np.dtype("<u4")


def distinct_n(sentences: Iterable[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams over all n-grams (Li et al. 2016), in [0, 1]; 0.0 where no sentence has n tokens.

    N-grams do not cross sentences. The value falls as text grows: compare only sets of the same size.
    """
    if n < 1:
        raise ValueError(f"n-grams have at least one token, got n={n}")
    seen: set[tuple[Hashable, ...]] = set()
    total = 0
    for sentence in sentences:
        for start in range(len(sentence) - n + 1):
            seen.add(tuple(sentence[start : start + n]))
            total += 1
    return len(seen) / total if total else 0.0


def sequence_hashes(tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sorted distinct hashes of the sequences tokens[offsets[i]:offsets[i + 1]], uint64: 8 bytes a sequence.

    A hash covers the ids, not their dtype. By chance, a sample equals the hash of one of n sequences with
    probability n / 2^64.
    """
    ids = tokens.astype(_ID)
    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return np.unique(np.fromiter((_hash(ids[a:b]) for a, b in bounds), np.uint64, len(offsets) - 1))


def verbatim_fraction(samples: Sequence[Sequence[int] | np.ndarray], training_hashes: np.ndarray) -> float:
    """Fraction of samples that equal a whole training sequence, end included; 0.0 without samples.

    Args:
        samples: token ids; one cut off before its end of sequence equals no training sequence.
        training_hashes: from `sequence_hashes`.
    """
    if len(samples) == 0:
        return 0.0
    hashes = np.array([_hash(np.asarray(sample, dtype=_ID)) for sample in samples], dtype=np.uint64)
    return float(np.isin(hashes, training_hashes).mean())


def word_count(texts: Iterable[str]) -> int:
    """Words of texts: what white space separates, and the end of each text as one more.

    The ends make it the token count of a tokenizer whose tokens are the words.
    """
    return sum(len(text.split()) + 1 for text in texts)


def perplexities(nll: float, *, sequences: int, tokens: int, words: int) -> dict[str, float]:
    """A likelihood in the three units that are in use.

    With subword tokens only nats per sequence and perplexity per word can be compared between tokenizers.

    Args:
        nll: -log p of all sequences together, their ends included; nats.
        sequences, tokens, words: what it is shared over, the ends of sequence counted (`word_count`).

    Returns:
        nll_per_seq in nats; ppl_per_token = exp(nll / tokens); ppl_per_word = exp(nll / words). A perplexity beyond
        the range of float64 is inf.
    """
    return {
        "nll_per_seq": nll / sequences,
        "ppl_per_token": _exp(nll / tokens),
        "ppl_per_word": _exp(nll / words),
    }


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _hash(ids: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(ids.tobytes())
