"""Interpolated Kneser-Ney models over token ids: baselines a text VAE has to beat, and judges of its samples.

Sources: Ney, Essen and Kneser 1994 (absolute discounting, D = n1 / (n1 + 2 n2)); Kneser and Ney 1995
(continuation counts); Chen and Goodman 1999 (interpolation; modified: a discount each for counts of 1, 2 and more).
On sentence-level PTB the model of order 2 with one discount has test perplexity 186.8, the modified one of order 5
141.2, which is also what Mikolov et al. 2011 report for it.

Shapes: N tokens, V vocabulary, C distinct k-grams of the training text, R sequences that are drawn. Sequences are
`(tokens, offsets)`: integer ids [N] and int64 [n + 1]; sequence i is tokens[offsets[i]:offsets[i + 1]], its last
token the end of sequence, which is predicted and counted. Before a first token stands `bos_id`, which is never
predicted, and nothing before that.

A k-gram is named by its rank among the distinct ones. The pair (rank of its first k - 1 tokens, last token), as one
number, is its key; a level of the model is the sorted keys with two numbers each. Memory is O(order N) while training
(about 150 bytes a token at order 5) and O(order C + V) after it; there is no V x V matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vae_dist.errors import DataError

Sequences = tuple[np.ndarray, np.ndarray]

# For a text without counts of one or without counts of two, where the estimate is 0, 1 or undefined.
_FALLBACK_DISCOUNT = 0.75
# The rank of what was never seen; keys made of it are negative and so found nowhere.
_NONE = -1


class KneserNey:
    """Interpolated Kneser-Ney; of order 1, discounted relative frequencies.

    p_k(w | c) = (a(c w) - d(c w)) / a(c .) + d(c .) / a(c .) * p_(k-1)(w | c without its first token), where c has
    k - 1 tokens and a dot stands for the sum over w. At the highest order, and for k-grams that begin with BOS, a
    counts occurrences; below, the distinct tokens before the k-gram. d is the discount of a count, 0 for a count of
    0. p_0 is uniform over the ids that can be predicted. After a context that was never seen p_k is p_(k-1).
    """

    def __init__(
        self,
        sequences: Sequences,
        vocab_size: int,
        *,
        order: int = 5,
        modified: bool = True,
        bos_id: int,
        excluded_ids: Sequence[int] = (),
    ) -> None:
        """Estimate from `sequences`.

        Args:
            order: tokens of the longest k-gram; 1 looks at no context.
            modified: three discounts per order; else, and where the text is too small for three, one.
            bos_id: stands before a first token; has probability 0.
            excluded_ids: others with probability 0, as padding.

        Raises:
            DataError: the text holds an id that is never predicted, or there is nothing to predict.
        """
        if order < 1:
            raise ValueError(f"the order of an n-gram model is at least 1, got {order}")
        self.order, self.bos_id, self.vocab_size = order, bos_id, vocab_size
        self._predictable_V = np.ones(vocab_size, dtype=bool)
        self._predictable_V[[bos_id, *excluded_ids]] = False
        if not self._predictable_V.any():
            raise DataError(f"all {vocab_size} ids of the vocabulary are excluded: there is nothing to predict")
        keys, counts = self._count(*self._checked(sequences))
        discounts = [_discounts(count, modified) for count in counts]
        uniform_V = self._predictable_V / self._predictable_V.sum()
        total = counts[0].sum()
        rest = discounts[0].sum() / total if total else 1.0
        self._p_V = (counts[0] - discounts[0]) / max(total, 1) + rest * uniform_V
        contexts = [vocab_size, *map(len, keys)]
        levels = zip(keys, counts[1:], discounts[1:], contexts, strict=False)
        self._levels = [_Level(*level, vocab_size) for level in levels]

    def log_probability(self, sequences: Sequences) -> float:
        """Sum of log p over all tokens, the ends of sequence included; nats."""
        token_N, position_N = self._checked(sequences)
        p_N, node_N = self._p_V[token_N], token_N
        for k, level in enumerate(self._levels, 2):
            node_N, p_N = level.extend(self._contexts(node_N, position_N, k), token_N, p_N)
        return float(np.log(p_N).sum())

    def perplexity(self, sequences: Sequences) -> float:
        """exp(-log p / tokens), the ends of sequence counted."""
        count = len(sequences[0])
        if count == 0:
            raise DataError("the perplexity of an empty text is not defined: give at least one sequence")
        return float(np.exp(-self.log_probability(sequences) / count))

    def distribution(self, context: Sequence[int]) -> np.ndarray:
        """p(. | context), float64 [V]; the context of a first token is [bos_id]."""
        p_V, token_V = self._p_V, np.arange(self.vocab_size)
        for k, level in enumerate(self._levels, 2):
            if len(context) >= k - 1:
                context_V = np.full(self.vocab_size, self._rank(context[len(context) - k + 1 :]))
                _, p_V = level.extend(context_V, token_V, p_V)
        return p_V

    def sample(self, count: int, *, seed: int, eos_id: int, max_tokens: int) -> Sequences:
        """Draw sequences; one that does not end within `max_tokens` is cut off there, without `eos_id`."""
        rng = np.random.default_rng(seed)
        unigram_V, cumulative = np.cumsum(self._p_V), [np.cumsum(level.seen_C) for level in self._levels]
        contexts = [np.full(count, self.bos_id if k == 2 else _NONE) for k in range(2, self.order + 1)]
        running_R, columns = np.ones(count, dtype=bool), []
        for _ in range(max_tokens):
            # One uniform number finds the order and, there, the token.
            uniform_R, token_R = rng.random(count), np.full(count, _NONE)
            for level, context_R, sum_C in reversed(list(zip(self._levels, contexts, cumulative, strict=True))):
                uniform_R, token_R = level.draw(context_R, sum_C, uniform_R, token_R)
            drawn_R = np.searchsorted(unigram_V, uniform_R * unigram_V[-1], side="right")
            token_R = np.where(token_R == _NONE, np.minimum(drawn_R, self.vocab_size - 1), token_R)
            columns.append(np.where(running_R, token_R, _NONE))
            running_R = running_R & (token_R != eos_id)
            longer = [level.find(c, token_R)[0] for level, c in zip(self._levels, contexts, strict=True)]
            contexts = [token_R, *longer][: self.order - 1]
            if not running_R.any():
                break
        token_RT = np.stack(columns, axis=1) if columns else np.empty((count, 0), dtype=np.int64)
        return token_RT[token_RT != _NONE], np.append(0, (token_RT != _NONE).sum(axis=1).cumsum())

    def _count(self, token_N: np.ndarray, position_N: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Sorted keys of the k-grams for k = 2, ..., and their counts a for k = 1, 2, ..."""
        keys, counts, size, node_N = [], [], self.vocab_size, token_N
        for k in range(2, self.order + 1):
            context_N = self._contexts(node_N, position_N, k)
            at_N = np.flatnonzero(context_N != _NONE)
            key_N = context_N[at_N] * self.vocab_size + token_N[at_N]
            key_C, first_C, rank_N = np.unique(key_N, return_index=True, return_inverse=True)
            # Each distinct k-gram is one distinct token before the shorter one in which it ends; before one that
            # begins with BOS there is none.
            preceded, begins = node_N[at_N[first_C]], node_N[position_N == k - 3]
            counts.append(np.bincount(np.concatenate([preceded, begins]), minlength=size))
            keys.append(key_C)
            size, node_N = len(key_C), np.full(len(token_N), _NONE)
            node_N[at_N] = rank_N
        counts.append(np.bincount(node_N[node_N != _NONE], minlength=size))
        return keys, counts

    def _contexts(self, node_N: np.ndarray, position_N: np.ndarray, k: int) -> np.ndarray:
        """The rank of the k - 1 tokens before each token, given that of the k - 1 tokens that end with it."""
        context_N = np.empty_like(node_N)
        context_N[1:] = node_N[:-1]
        context_N[position_N == 0] = self.bos_id if k == 2 else _NONE
        return context_N

    def _rank(self, tokens: Sequence[int]) -> int:
        """The rank of a k-gram, or `_NONE`."""
        node = np.array(tokens[:1])
        for level, token in zip(self._levels, tokens[1:], strict=False):
            node, _ = level.find(node, np.array([token]))
        return int(node[0])

    def _checked(self, sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and their positions in their sequences, int64 [N] each; refuses ids the model never predicts."""
        token_N, offsets = sequences[0].astype(np.int64), sequences[1]
        size = self.vocab_size
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
        return token_N, np.arange(len(token_N)) - np.repeat(offsets[:-1], np.diff(offsets))


class _Level:
    """The k-grams of one order above 1.

    Attributes:
        seen_C: float64, the discounted share of each k-gram after its context.
        backoff: float64, for each context the weight of the lower order; 1 after what was never seen.
    """

    def __init__(
        self, key_C: np.ndarray, count_C: np.ndarray, discount_C: np.ndarray, contexts: int, vocab_size: int
    ) -> None:
        context_C = key_C // vocab_size
        # One more than there are contexts: what `_NONE` finds, at the end.
        total, held_back = (np.bincount(context_C, of_C, minlength=contexts + 1) for of_C in (count_C, discount_C))
        self._key_C, self._vocab_size = key_C, vocab_size
        self.seen_C = (count_C - discount_C) / total[context_C]
        self.backoff = np.divide(held_back, total, out=np.ones(contexts + 1), where=total > 0)

    def find(self, context_N: np.ndarray, token_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rank of each k-gram, or `_NONE`, and its discounted share, or 0."""
        key_N = context_N * self._vocab_size + token_N
        if len(self._key_C) == 0:
            return np.full(len(key_N), _NONE), np.zeros(len(key_N))
        at_N = np.minimum(np.searchsorted(self._key_C, key_N), len(self._key_C) - 1)
        is_seen_N = self._key_C[at_N] == key_N
        return np.where(is_seen_N, at_N, _NONE), np.where(is_seen_N, self.seen_C[at_N], 0.0)

    def extend(self, context_N: np.ndarray, token_N: np.ndarray, p_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rank of each k-gram, and p at this order from p at the order below."""
        node_N, seen_N = self.find(context_N, token_N)
        return node_N, seen_N + self.backoff[context_N] * p_N

    def draw(
        self, context_R: np.ndarray, sum_C: np.ndarray, uniform_R: np.ndarray, token_R: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Give rows without a token one of this order where `uniform_R` lies in its mass; stretch what is left."""
        weight_R = self.backoff[context_R]
        here_R = np.flatnonzero((token_R == _NONE) & (uniform_R < 1.0 - weight_R))
        first_R, last_R = (np.searchsorted(self._key_C, (context_R[here_R] + i) * self._vocab_size) for i in (0, 1))
        before_R = sum_C[first_R] - self.seen_C[first_R]
        at_R = np.searchsorted(sum_C, before_R + uniform_R[here_R], side="right").clip(first_R, last_R - 1)
        token_R[here_R] = self._key_C[at_R] % self._vocab_size
        return (uniform_R - (1.0 - weight_R)) / weight_R, token_R


def _discounts(count_C: np.ndarray, modified: bool) -> np.ndarray:
    """What each count gives away, float64 [C]: above 0, at most the count, and 0 for a count of 0.

    One discount is the leaving-one-out estimate D = n1 / (n1 + 2 n2), where n_k entries have count k; three are
    k - (k + 1) D n_(k+1) / n_k for counts of 1, 2, and 3 or more.
    """
    n1, n2, n3, n4 = (int((count_C == k).sum()) for k in (1, 2, 3, 4))
    one = n1 / (n1 + 2 * n2) if n1 and n2 else _FALLBACK_DISCOUNT
    three = [1 - 2 * one * n2 / n1, 2 - 3 * one * n3 / n2, 3 - 4 * one * n4 / n3] if n1 and n2 and n3 else [0.0]
    chosen = three if modified and min(three) > 0 else [one] * 3
    return np.array([0.0, *chosen])[np.minimum(count_C, 3)]
