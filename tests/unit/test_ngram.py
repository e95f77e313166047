"""The n-gram models against hand computation, a slow independent model, and the known PTB value."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_dist.errors import DataError
from vae_dist.evaluate.ngram import KneserNey, Sequences

PAD, BOS, EOS = 0, 1, 2
EXCLUDED = (PAD, BOS)

Corpus = list[list[int]]


def pack(corpus: Corpus, dtype: str = "int64") -> Sequences:
    """Sequences as the flat array and offsets the models read."""
    tokens = np.array([token for sequence in corpus for token in sequence], dtype=dtype)
    return tokens, np.cumsum([0] + [len(sequence) for sequence in corpus])


def model_of(corpus: Corpus, vocab_size: int, order: int = 2, modified: bool = False) -> KneserNey:
    return KneserNey(pack(corpus), vocab_size, order=order, modified=modified, bos_id=BOS, excluded_ids=EXCLUDED)


def slow_discounts(counts: list[int], modified: bool) -> list[Fraction]:
    """What counts of 0, 1, 2, and 3 or more give away (Chen and Goodman 1999, equation 26)."""
    n1, n2, n3, n4 = (counts.count(k) for k in (1, 2, 3, 4))
    one = Fraction(n1, n1 + 2 * n2) if n1 and n2 else Fraction(3, 4)
    if modified and n1 and n2 and n3:
        three = [1 - 2 * one * n2 / n1, 2 - 3 * one * n3 / n2, 3 - 4 * one * n4 / n3]
        if min(three) > 0:
            return [Fraction(0), *three]
    return [Fraction(0), one, one, one]


def slow_counts(corpus: Corpus, order: int) -> list[dict[tuple[int, ...], int]]:
    """The counts of all k-grams, k = 1 to order, from dictionaries and sets: BOS stands before each sequence."""
    occurrences: Counter[tuple[int, ...]] = Counter()
    before: dict[tuple[int, ...], set[int]] = {}
    for sequence in corpus:
        text = [BOS, *sequence]
        for end in range(2, len(text) + 1):
            for start in range(max(0, end - order), end):
                gram = tuple(text[start:end])
                occurrences[gram] += 1
                before.setdefault(gram, set()).update(text[start - 1 : start] if start else [])
    counts: list[dict[tuple[int, ...], int]] = [{} for _ in range(order)]
    for gram, count in occurrences.items():
        is_raw = len(gram) == order or gram[0] == BOS
        counts[len(gram) - 1][gram] = count if is_raw else len(before[gram])
    return counts


def slow_kneser_ney(
    counts_of: list[dict[tuple[int, ...], int]], context: list[int], modified: bool
) -> dict[int, Fraction]:
    """p(. | context) from `slow_counts`, in exact fractions, as the formula in Chen and Goodman reads."""
    ids = [i for i in range(VOCAB) if i not in EXCLUDED]
    p = dict.fromkeys(ids, Fraction(1, len(ids)))
    for k, counts in enumerate(counts_of, 1):
        if len(context) < k - 1:
            break
        history = tuple(context[len(context) - k + 1 :])
        discounts = slow_discounts(list(counts.values()), modified)
        after = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == history}
        total = sum(after.values())
        if total:
            held_back = sum(discounts[min(count, 3)] for count in after.values())
            kept = {w: after.get(w, 0) - discounts[min(after.get(w, 0), 3)] for w in ids}
            p = {w: kept[w] / total + held_back / total * p[w] for w in ids}
    return p


def test_bigram_by_hand() -> None:
    # Words 3 and 4, vocabulary of 6 (5 is never seen). Bigrams with counts:
    #   (BOS 3) 2   (3 4) 2   (4 EOS) 1   (4 4) 1   (3 EOS) 0   (4 3) 0   ->  n1 = 2, n2 = 2, D = 2/6 = 1/3
    model = model_of([[3, 4, EOS], [3, 4, 4]], 6)
    # Continuation counts: 3: 1, 4: 2 (after 3 and 4), EOS: 1; n1 = 2, n2 = 1, D = 2/4 = 1/2; 4 predictable.
    #   rest = 1/2 * 3/4 / 4 = 3/32;  p1(3) = p1(EOS) = (1 - 1/2)/4 + 3/32 = 7/32;  p1(4) = 15/32
    #   p1(5) = 3/32
    # After 4 (total 2, 2 types): weight of p1 = 1/3 * 2/2 = 1/3; seen ones have (1 - 1/3)/2 = 1/3 more.
    expected = [0, 0, 1 / 3 + 7 / 96, 7 / 96, 1 / 3 + 15 / 96, 3 / 96]
    np.testing.assert_allclose(model.distribution([4]), expected, rtol=1e-14)
    # After BOS (total 2, 1 type): weight 1/6, and 3 has (2 - 1/3)/2 = 5/6 more. After 5, unseen: p1 itself.
    expected = [0, 0, 7 / 192, 5 / 6 + 7 / 192, 15 / 192, 3 / 192]
    np.testing.assert_allclose(model.distribution([BOS]), expected, rtol=1e-14)
    np.testing.assert_allclose(model.distribution([5]), [0, 0, 7 / 32, 7 / 32, 15 / 32, 3 / 32], rtol=1e-14)
    # A text of two tokens: 4 first (context BOS), then the end.
    log_p = math.log(15 / 192) + math.log(1 / 3 + 7 / 96)
    assert model.log_probability(pack([[4, EOS]])) == pytest.approx(log_p, rel=1e-14)
    assert model.perplexity(pack([[4, EOS]])) == pytest.approx(math.exp(-log_p / 2), rel=1e-14)


def test_unigram_by_hand() -> None:
    # Counts 3: 2, 4: 1, EOS: 1; D = 2 / (2 + 2) = 1/2; rest = 1/2 * 3/4 / 4 ids = 3/32.
    model = model_of([[3, 4, 3, EOS]], 6, order=1)
    expected = [0, 0, 1 / 8 + 3 / 32, 3 / 8 + 3 / 32, 1 / 8 + 3 / 32, 3 / 32]
    np.testing.assert_allclose(model.distribution([]), expected, rtol=1e-14)
    expected_log = math.log(expected[5]) + math.log(expected[2])
    assert model.log_probability(pack([[5, EOS]])) == pytest.approx(expected_log, rel=1e-14)


VOCAB = 9
WORDS = st.lists(st.integers(EOS + 1, VOCAB - 2), max_size=6)
CORPORA = st.lists(WORDS.map(lambda words: [*words, EOS]), max_size=12)


@settings(max_examples=40, deadline=None)
@given(CORPORA, st.sampled_from(["int64", "uint16", "uint32"]), st.integers(1, 4), st.booleans())
def test_every_distribution_sums_to_one_and_equals_the_slow_model(
    corpus: Corpus, dtype: str, order: int, modified: bool
) -> None:
    data = pack(corpus, dtype)
    model = KneserNey(data, VOCAB, order=order, modified=modified, bos_id=BOS, excluded_ids=EXCLUDED)
    # All single contexts (the end of sequence, never one in text, and 8, in no corpus, too), and every beginning.
    contexts = [[], *([token] for token in range(BOS, VOCAB)), [BOS, 8], [8, 3, 3], [3, 8, 3]]
    contexts += [[BOS, *sequence[:end]] for sequence in corpus for end in range(1, len(sequence))]
    contexts += [sequence[start:-1] for sequence in corpus for start in range(1, len(sequence))]
    counts = slow_counts(corpus, order)
    for context in contexts:
        p = model.distribution(context)
        assert math.fsum(p) == pytest.approx(1.0, abs=1e-12)
        assert (p[EOS:] > 0).all()
        assert (p[list(EXCLUDED)] == 0).all()
        slow = slow_kneser_ney(counts, context, modified)
        np.testing.assert_allclose(p[EOS:], [float(slow[i]) for i in range(EOS, VOCAB)], rtol=1e-11)


@settings(max_examples=40, deadline=None)
@given(CORPORA.filter(bool), CORPORA.filter(bool), st.integers(1, 5), st.booleans())
def test_perplexity_is_the_product_of_slow_probabilities(
    corpus: Corpus, text: Corpus, order: int, modified: bool
) -> None:
    counts = slow_counts(corpus, order)
    log_p = sum(
        math.log(slow_kneser_ney(counts, [BOS, *sequence[:at]], modified)[token])
        for sequence in text
        for at, token in enumerate(sequence)
    )
    model, tokens = model_of(corpus, VOCAB, order, modified), sum(map(len, text))
    assert model.log_probability(pack(text)) == pytest.approx(log_p, rel=1e-10)
    assert model.perplexity(pack(text)) == pytest.approx(math.exp(-log_p / tokens), rel=1e-10)


def test_modified_discounts_apply_where_the_text_is_large_enough() -> None:
    # Counts 1, 1, 1, 1, 2, 2, 3: n1 = 4, n2 = 2, n3 = 1, n4 = 0; D = 4 / 8 = 1/2. Three discounts:
    #   1 - 2/2 * 2/4 = 1/2,   2 - 3/2 * 1/2 = 5/4,   3 - 0 = 3.   Given away: 4/2 + 2 * 5/4 + 3 = 7.5 of 11.
    corpus = [[3, 4, 5, 6, 7, 7, 8, 8, EOS, EOS, EOS]]
    model = model_of(corpus, 12, order=1, modified=True)
    uniform = 7.5 / 11 / 10
    expected = [0, 0, uniform] + [0.5 / 11 + uniform] * 4 + [0.75 / 11 + uniform] * 2 + [uniform] * 3
    np.testing.assert_allclose(model.distribution([]), expected, rtol=1e-14)


def test_contexts_end_at_the_beginning_of_a_sequence() -> None:
    # 3 4 is followed by 5 inside of a text and by 6 at its beginning: order 3 tells them apart, whatever came before.
    corpus = [[7, 3, 4, 5, EOS], [3, 4, 6, EOS]] * 5
    model = model_of(corpus, 9, order=4)
    assert model.distribution([BOS, 3, 4]).argmax() == 6
    assert model.distribution([7, 3, 4]).argmax() == 5
    # The sequence before it in the array is no context of a first token.
    alone, behind = pack([[3, 4, 6, EOS]]), pack([[7, 7, 7, EOS], [3, 4, 6, EOS]])
    first = model.log_probability(pack([[7, 7, 7, EOS]]))
    assert model.log_probability(behind) == pytest.approx(first + model.log_probability(alone), rel=1e-13)


def test_drawn_sequences_have_the_models_distribution() -> None:
    corpus = [[3, 4, EOS], [3, 4, 5, EOS], [4, 4, EOS], [5, EOS], [3, 5, 4, EOS]]
    model = model_of(corpus, 7, order=3, modified=True)
    count = 40_000
    tokens, offsets = model.sample(count, seed=1, eos_id=EOS, max_tokens=3)
    drawn = [tuple(tokens[a:b].tolist()) for a, b in pairwise(offsets)]
    assert all(len(row) == 3 or row[-1] == EOS for row in drawn)
    assert all(EOS not in row[:-1] for row in drawn)
    # Every sequence's frequency against the product of its probabilities, in standard errors.
    found, outside = Counter(drawn), 1.0
    for row in {*found, (6, 6, 6), (3, 4, EOS)}:
        p = math.prod(float(model.distribution([BOS, *row[:at]])[token]) for at, token in enumerate(row))
        outside -= p
        assert found[row] / count == pytest.approx(p, abs=5 * math.sqrt(p / count) + 1e-12), row
    assert outside < 0.01, "no likely sequence is missing"
    again, _ = model.sample(count, seed=1, eos_id=EOS, max_tokens=3)
    np.testing.assert_array_equal(tokens, again)
    assert model.sample(10, seed=2, eos_id=EOS, max_tokens=0)[0].size == 0


@pytest.mark.parametrize("order", [1, 2, 4])
def test_empty_sequences_do_not_move_the_contexts(order: int) -> None:
    corpus: Corpus = [[3, EOS], [4, 3, EOS]]
    tokens, _ = pack(corpus)
    with_empty = (tokens, np.array([0, 0, 2, 2, 5, 5]))
    assert model_of(corpus, 6, order).log_probability(with_empty) == model_of(corpus, 6, order).log_probability(
        pack(corpus)
    )


@pytest.mark.parametrize("bad", [BOS, PAD, 6, -1])
def test_ids_that_are_never_predicted_are_refused_with_their_position(bad: int) -> None:
    model = model_of([[3, EOS]], 6)
    with pytest.raises(DataError, match=f"token id {bad} at position 1 .*vocabulary of 6"):
        model.perplexity(pack([[3, bad, EOS]]))
    with pytest.raises(DataError, match="token id"):
        model_of([[bad, EOS]], 6)


def test_text_that_cannot_be_scored_is_refused() -> None:
    with pytest.raises(DataError, match="empty text"):
        model_of([[3, EOS]], 6).perplexity(pack([]))
    with pytest.raises(DataError, match="offsets"):
        model_of([[3, EOS]], 6).log_probability((np.array([3, EOS]), np.array([0, 1])))
    with pytest.raises(DataError, match="nothing to predict"):
        model_of([], 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        model_of([[3, EOS]], 6, order=0)


def test_a_large_vocabulary_needs_no_square_matrix_and_no_32_bit_key_overflows() -> None:
    rng = np.random.default_rng(0)
    vocab_size, count = 2_000_000, 50_000
    tokens = rng.integers(3, vocab_size, count)
    offsets = np.arange(0, count + 1, 20)
    model = KneserNey((tokens, offsets), vocab_size, bos_id=BOS, excluded_ids=EXCLUDED)
    # A matrix would hold 4e12 entries; ids this large also overflow a 32-bit bigram key.
    p = model.distribution(tokens[-5:-1].tolist())
    assert p.sum() == pytest.approx(1.0, abs=1e-9)
    assert p.argmax() == tokens[-1]


def test_ptb_perplexities_are_the_known_ones(ptb: Path) -> None:
    ids = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    splits = {}
    for name in ("train", "test"):
        lines = (ptb / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        splits[name] = [[ids.setdefault(word, len(ids)) for word in line.split()] + [EOS] for line in lines]
    train, test = pack(splits["train"]), pack(splits["test"])
    assert (len(ids), len(test[0])) == (10_002, 82_430)
    known = {(1, False): 639.30, (2, False): 186.80, (5, True): 141.19}
    for (order, modified), perplexity in known.items():
        model = KneserNey(train, len(ids), order=order, modified=modified, bos_id=BOS, excluded_ids=EXCLUDED)
        assert model.perplexity(test) == pytest.approx(perplexity, abs=0.05)
    for context in ([BOS], [ids["the"]], [BOS, ids["the"]], train[0][100:104].tolist()):
        assert math.fsum(model.distribution(context)) == pytest.approx(1.0, abs=1e-9)
