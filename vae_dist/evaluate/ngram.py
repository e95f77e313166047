"""Unigram and interpolated Kneser-Ney bigram models over token ids: the baselines a text VAE has to beat.

Sources: Ney, Essen and Kneser 1994 (absolute discounting, D = n1 / (n1 + 2 n2)); Kneser and Ney 1995
(continuation counts); Chen and Goodman 1999 (interpolation). On sentence-level PTB the bigram has test
perplexity 186.8.

Shapes: N tokens, V vocabulary, C distinct bigrams of the training text. Sequences are `(tokens, offsets)`:
integer ids [N] and int64 [n + 1]; sequence i is tokens[offsets[i]:offsets[i + 1]], its last token the end of
sequence, which is predicted and counted. The context of a first token is `bos_id`, which is never predicted.

Memory is O(N) while training and O(C + V) after it; there is no V x V matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from vae_dist.errors import DataError

Sequences = tuple[np.ndarray, np.ndarray]

# For a text without counts of one or without counts of two, where the estimate is 0, 1 or undefined.
_FALLBACK_DISCOUNT = 0.75


class LanguageModel(ABC):
    """A model of the next token given the one before it."""

    def __init__(self, vocab_size: int, excluded_ids: Sequence[int], bos_id: int | None) -> None:
        self.bos_id = bos_id
        self._predictable_V = np.ones(vocab_size, dtype=bool)
        self._predictable_V[list(excluded_ids)] = False
        if bos_id is not None:
            self._predictable_V[bos_id] = False
        if not self._predictable_V.any():
            raise DataError(f"all {vocab_size} ids of the vocabulary are excluded: there is nothing to predict")

    @abstractmethod
    def probability(self, context_N: np.ndarray, token_N: np.ndarray) -> np.ndarray:
        """p(token | context), float64 [N]; 0 for ids that are never predicted."""

    def log_probability(self, sequences: Sequences) -> float:
        """Sum of log p over all tokens, the ends of sequence included; nats."""
        context_N, token_N = self._pairs(sequences)
        return float(np.log(self.probability(context_N, token_N)).sum())

    def perplexity(self, sequences: Sequences) -> float:
        """exp(-log p / tokens), the ends of sequence counted."""
        count = len(sequences[0])
        if count == 0:
            raise DataError("the perplexity of an empty text is not defined: give at least one sequence")
        return float(np.exp(-self.log_probability(sequences) / count))

    def _pairs(self, sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
        """Context and token of every prediction, int64 [N] each; refuses ids the model never predicts."""
        token_N, offsets = sequences[0].astype(np.int64), sequences[1]
        size = len(self._predictable_V)
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(token_N):
            raise DataError(f"offsets have to run from 0 to the number of tokens, {len(token_N)}")
        inside_N = (token_N >= 0) & (token_N < size)
        bad_N = ~inside_N
        bad_N[inside_N] = ~self._predictable_V[token_N[inside_N]]
        if bad_N.any():
            at = int(bad_N.argmax())
            raise DataError(
                f"token id {token_N[at]} at position {at} is outside the vocabulary of {size}, or padding or "
                "a start of sequence, which are never predicted: remove it, or use this data set's tokenizer"
            )
        context_N = np.empty_like(token_N)
        context_N[1:] = token_N[:-1]
        first = offsets[:-1]
        context_N[first[first < len(token_N)]] = 0 if self.bos_id is None else self.bos_id
        return context_N, token_N


class Unigram(LanguageModel):
    """Relative frequencies, discounted just enough to give every predictable id some mass.

    p(w) = max(c(w) - D, 0) / N + D T / N * 1 / V', with T distinct tokens seen and V' predictable ids.
    """

    def __init__(self, sequences: Sequences, vocab_size: int, *, excluded_ids: Sequence[int] = ()) -> None:
        super().__init__(vocab_size, excluded_ids, None)
        _, token_N = self._pairs(sequences)
        self._p_V = _discounted(np.bincount(token_N, minlength=vocab_size), self._predictable_V)

    def probability(self, context_N: np.ndarray, token_N: np.ndarray) -> np.ndarray:
        """p(token); the context is ignored."""
        return self._p_V[token_N]


class KneserNeyBigram(LanguageModel):
    """Interpolated Kneser-Ney with one discount per order.

    p(w | v) = max(c(v w) - D, 0) / c(v) + D T(v) / c(v) * p1(w), where T(v) is the number of distinct tokens
    seen after v and p1 the same formula over continuation counts (how many distinct contexts precede w),
    itself interpolated with the uniform distribution. After an unseen context p(w | v) = p1(w).
    """

    def __init__(self, sequences: Sequences, vocab_size: int, *, bos_id: int, excluded_ids: Sequence[int] = ()) -> None:
        super().__init__(vocab_size, excluded_ids, bos_id)
        context_N, token_N = self._pairs(sequences)
        self._bigram_C, count_C = np.unique(context_N * vocab_size + token_N, return_counts=True)
        context_C, token_C = np.divmod(self._bigram_C, vocab_size)
        discount = _discount(count_C)
        total_V = np.bincount(context_C, count_C, minlength=vocab_size)
        self._seen_C = (count_C - discount) / total_V[context_C]
        types_V = np.bincount(context_C, minlength=vocab_size)
        self._backoff_V = np.divide(discount * types_V, total_V, out=np.ones(vocab_size), where=total_V > 0)
        self._lower_V = _discounted(np.bincount(token_C, minlength=vocab_size), self._predictable_V)

    def probability(self, context_N: np.ndarray, token_N: np.ndarray) -> np.ndarray:
        """p(token | context)."""
        p_N = self._backoff_V[context_N] * self._lower_V[token_N]
        if len(self._bigram_C) == 0:
            return p_N
        bigram_N = np.asarray(context_N, dtype=np.int64) * len(self._lower_V) + token_N
        at_N = np.minimum(np.searchsorted(self._bigram_C, bigram_N), len(self._bigram_C) - 1)
        return p_N + np.where(self._bigram_C[at_N] == bigram_N, self._seen_C[at_N], 0.0)


def _discount(counts: np.ndarray) -> float:
    """The leaving-one-out estimate n1 / (n1 + 2 n2), where n_k entries have count k; always above 0."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once and twice else _FALLBACK_DISCOUNT


def _discounted(count_V: np.ndarray, predictable_V: np.ndarray) -> np.ndarray:
    """Absolute discounting, interpolated with the uniform distribution over predictable ids; float64 [V]."""
    uniform_V = predictable_V / predictable_V.sum()
    total = count_V.sum()
    if total == 0:
        return uniform_V
    discount = _discount(count_V)
    kept_V = np.maximum(count_V - discount, 0.0)
    return kept_V / total + discount * (count_V > 0).sum() / total * uniform_V
