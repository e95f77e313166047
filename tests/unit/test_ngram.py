"""The n-gram baselines against hand computation, a slow independent model, and the known PTB value."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.errors import DataError
from vae_dist.evaluate.ngram import KneserNeyBigram, Sequences, Unigram

PAD, BOS, EOS = 0, 1, 2
EXCLUDED = (PAD, BOS)

Corpus = list[list[int]]


def pack(corpus: Corpus, dtype: str = "int64") -> Sequences:
    """Sequences as the flat array and offsets the models read."""
    tokens = np.array([token for sequence in corpus for token in sequence], dtype=dtype)
    return tokens, np.cumsum([0] + [len(sequence) for sequence in corpus])


def bigram(corpus: Corpus, vocab_size: int) -> KneserNeyBigram:
    return KneserNeyBigram(pack(corpus), vocab_size, bos_id=BOS, excluded_ids=EXCLUDED)


def discount(counts: list[int]) -> Fraction:
    n1, n2 = counts.count(1), counts.count(2)
    return Fraction(n1, n1 + 2 * n2) if n1 and n2 else Fraction(3, 4)


def smooth(counts: dict[int, int], vocab_size: int) -> dict[int, Fraction]:
    """max(c - D, 0) / N + D T / N * uniform, in exact fractions."""
    ids = [i for i in range(vocab_size) if i not in EXCLUDED]
    total, d = sum(counts.values()), discount(list(counts.values()))
    if not total:
        return {i: Fraction(1, len(ids)) for i in ids}
    rest = d * len(counts) / total / len(ids)
    return {i: max(counts.get(i, 0) - d, Fraction(0)) / total + rest for i in ids}


def slow_kneser_ney(corpus: Corpus, vocab_size: int, context: int) -> dict[int, Fraction]:
    """p(. | context) from dictionaries, as the formula in Chen and Goodman reads."""
    pairs = Counter((a, b) for sequence in corpus for a, b in zip([BOS, *sequence], sequence, strict=False))
    lower = smooth(Counter(b for _, b in pairs), vocab_size)
    after = {b: count for (a, b), count in pairs.items() if a == context}
    total, d = sum(after.values()), discount(list(pairs.values()))
    if not total:
        return lower
    return {w: max(after.get(w, 0) - d, Fraction(0)) / total + d * len(after) / total * p for w, p in lower.items()}


def distribution(model: KneserNeyBigram | Unigram, context: int, vocab_size: int) -> np.ndarray:
    ids = np.arange(vocab_size)
    return model.probability(np.full(vocab_size, context), ids)


def test_bigram_by_hand() -> None:
    # Words 3 and 4, vocabulary of 6 (5 is never seen). Bigrams with counts:
    #   (BOS 3) 2   (3 4) 2   (4 EOS) 1   (4 4) 1   (3 EOS) 0   (4 3) 0   ->  n1 = 2, n2 = 2, D = 2/6 = 1/3
    model = bigram([[3, 4, EOS], [3, 4, 4]], 6)
    # Continuation counts: 3: 1, 4: 2 (after 3 and 4), EOS: 1; n1 = 2, n2 = 1, D = 2/4 = 1/2; 4 predictable.
    #   rest = 1/2 * 3/4 / 4 = 3/32;  p1(3) = p1(EOS) = (1 - 1/2)/4 + 3/32 = 7/32;  p1(4) = 15/32
    #   p1(5) = 3/32
    # After 4 (total 2, 2 types): weight of p1 = 1/3 * 2/2 = 1/3; seen ones have (1 - 1/3)/2 = 1/3 more.
    expected = [0, 0, 1 / 3 + 7 / 96, 7 / 96, 1 / 3 + 15 / 96, 3 / 96]
    np.testing.assert_allclose(distribution(model, 4, 6), expected, rtol=1e-14)
    # After BOS (total 2, 1 type): weight 1/6, and 3 has (2 - 1/3)/2 = 5/6 more. After 5, unseen: p1 itself.
    expected = [0, 0, 7 / 192, 5 / 6 + 7 / 192, 15 / 192, 3 / 192]
    np.testing.assert_allclose(distribution(model, BOS, 6), expected, rtol=1e-14)
    np.testing.assert_allclose(distribution(model, 5, 6), [0, 0, 7 / 32, 7 / 32, 15 / 32, 3 / 32], rtol=1e-14)
    # A text of two tokens: 4 first (context BOS), then the end.
    log_p = math.log(15 / 192) + math.log(1 / 3 + 7 / 96)
    assert model.log_probability(pack([[4, EOS]])) == pytest.approx(log_p, rel=1e-14)
    assert model.perplexity(pack([[4, EOS]])) == pytest.approx(math.exp(-log_p / 2), rel=1e-14)


def test_unigram_by_hand() -> None:
    # Counts 3: 2, 4: 1, EOS: 1; D = 2 / (2 + 2) = 1/2; rest = 1/2 * 3/4 / 4 ids = 3/32.
    model = Unigram(pack([[3, 4, 3, EOS]]), 6, excluded_ids=EXCLUDED)
    expected = [0, 0, 1 / 8 + 3 / 32, 3 / 8 + 3 / 32, 1 / 8 + 3 / 32, 3 / 32]
    np.testing.assert_allclose(distribution(model, BOS, 6), expected, rtol=1e-14)
    expected_log = math.log(expected[5]) + math.log(expected[2])
    assert model.log_probability(pack([[5, EOS]])) == pytest.approx(expected_log, rel=1e-14)


VOCAB = 9
WORDS = st.lists(st.integers(EOS + 1, VOCAB - 2), max_size=6)
CORPORA = st.lists(WORDS.map(lambda words: [*words, EOS]), max_size=12)


@given(CORPORA, st.sampled_from(["int64", "uint16", "uint32"]))
def test_every_distribution_sums_to_one_and_equals_the_slow_model(corpus: Corpus, dtype: str) -> None:
    data = pack(corpus, dtype)
    model = KneserNeyBigram(data, VOCAB, bos_id=BOS, excluded_ids=EXCLUDED)
    # Contexts: start of sequence, end of sequence (never one in text), all words, and 8, in no corpus.
    for context in range(BOS, VOCAB):
        p = distribution(model, context, VOCAB)
        assert math.fsum(p) == pytest.approx(1.0, abs=1e-12)
        assert (p[EOS:] > 0).all()
        assert (p[list(EXCLUDED)] == 0).all()
        slow = slow_kneser_ney(corpus, VOCAB, context)
        np.testing.assert_allclose(p[EOS:], [float(slow[i]) for i in range(EOS, VOCAB)], rtol=1e-12)
    counts = Counter(token for sequence in corpus for token in sequence)
    unigram = distribution(Unigram(data, VOCAB, excluded_ids=EXCLUDED), 0, VOCAB)
    assert math.fsum(unigram) == pytest.approx(1.0, abs=1e-12)
    expected = smooth(counts, VOCAB)
    np.testing.assert_allclose(unigram[EOS:], [float(expected[i]) for i in range(EOS, VOCAB)], rtol=1e-12)


@given(CORPORA.filter(bool), CORPORA.filter(bool))
def test_perplexity_is_the_product_of_slow_probabilities(corpus: Corpus, text: Corpus) -> None:
    log_p = sum(
        math.log(slow_kneser_ney(corpus, VOCAB, context)[token])
        for sequence in text
        for context, token in zip([BOS, *sequence], sequence, strict=False)
    )
    tokens = sum(map(len, text))
    assert bigram(corpus, VOCAB).perplexity(pack(text)) == pytest.approx(math.exp(-log_p / tokens), rel=1e-10)


def test_empty_sequences_do_not_move_the_contexts() -> None:
    corpus: Corpus = [[3, EOS], [4, 3, EOS]]
    tokens, _ = pack(corpus)
    with_empty = (tokens, np.array([0, 0, 2, 2, 5, 5]))
    assert bigram(corpus, 6).log_probability(with_empty) == bigram(corpus, 6).log_probability(pack(corpus))


@pytest.mark.parametrize("bad", [BOS, PAD, 6, -1])
def test_ids_that_are_never_predicted_are_refused_with_their_position(bad: int) -> None:
    model = bigram([[3, EOS]], 6)
    with pytest.raises(DataError, match=f"token id {bad} at position 1 .*vocabulary of 6"):
        model.perplexity(pack([[3, bad, EOS]]))
    with pytest.raises(DataError, match="token id"):
        bigram([[bad, EOS]], 6)


def test_text_that_cannot_be_scored_is_refused() -> None:
    with pytest.raises(DataError, match="empty text"):
        bigram([[3, EOS]], 6).perplexity(pack([]))
    with pytest.raises(DataError, match="offsets"):
        bigram([[3, EOS]], 6).log_probability((np.array([3, EOS]), np.array([0, 1])))
    with pytest.raises(DataError, match="nothing to predict"):
        Unigram(pack([]), 2, excluded_ids=EXCLUDED)


def test_a_large_vocabulary_needs_no_square_matrix_and_no_32_bit_key_overflows() -> None:
    rng = np.random.default_rng(0)
    vocab_size, count = 2_000_000, 200_000
    tokens = rng.integers(3, vocab_size, count)
    offsets = np.arange(0, count + 1, 20)
    model = KneserNeyBigram((tokens, offsets), vocab_size, bos_id=BOS, excluded_ids=EXCLUDED)
    # A matrix would hold 4e12 entries; ids this large also overflow a 32-bit bigram key.
    p = distribution(model, int(tokens[-2]), vocab_size)
    assert p.sum() == pytest.approx(1.0, abs=1e-9)
    assert p.argmax() == tokens[-1]


def test_ptb_perplexity_is_the_published_one(ptb: Path) -> None:
    ids = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    splits = {}
    for name in ("train", "test"):
        lines = (ptb / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        splits[name] = [[ids.setdefault(word, len(ids)) for word in line.split()] + [EOS] for line in lines]
    train, test = pack(splits["train"]), pack(splits["test"])
    assert (len(ids), len(test[0])) == (10_002, 82_430)
    kneser_ney = KneserNeyBigram(train, len(ids), bos_id=BOS, excluded_ids=EXCLUDED)
    assert kneser_ney.perplexity(test) == pytest.approx(186.80, abs=0.05)
    unigram = Unigram(train, len(ids), excluded_ids=EXCLUDED)
    assert unigram.perplexity(test) == pytest.approx(639.30, abs=0.05)
