"""Diversity and copying of generated token ids, and the units of a perplexity."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.evaluate.text_metrics import distinct_n, perplexities, sequence_hashes, verbatim_fraction, word_count

TOKENS = np.array([5, 6, 2, 5, 6, 7, 2, 2, 5, 6, 2])
OFFSETS = np.array([0, 3, 7, 8, 11])


def test_distinct_n_by_hand() -> None:
    sentences = [[5, 6, 5, 6], [5, 6], [9]]
    # Bigrams: (5 6) (6 5) (5 6) | (5 6): 2 distinct of 4; none crosses a sentence.
    assert distinct_n(sentences, 1) == 3 / 7
    assert distinct_n(sentences, 2) == 2 / 4
    assert distinct_n(sentences, 4) == 1.0


def test_distinct_n_without_ngrams_is_zero_and_n_zero_is_refused() -> None:
    assert distinct_n([], 2) == 0.0
    assert distinct_n([[4]], 2) == 0.0
    with pytest.raises(ValueError, match="n=0"):
        distinct_n([[4]], 0)


def test_one_hash_a_distinct_sequence_in_eight_bytes_sorted() -> None:
    hashes = sequence_hashes(TOKENS, OFFSETS)
    assert hashes.dtype == np.uint64
    assert len(hashes) == 3, "the first and the last sequence are the same"
    assert (np.diff(hashes.astype(object)) > 0).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64, ">u2"])
def test_hash_does_not_depend_on_the_dtype_of_the_ids(dtype: str) -> None:
    np.testing.assert_array_equal(sequence_hashes(TOKENS.astype(dtype), OFFSETS), sequence_hashes(TOKENS, OFFSETS))


def test_ids_beyond_16_bits_are_told_apart() -> None:
    assert verbatim_fraction([[5 + 2**16, 6, 2], [5, 6, 2]], sequence_hashes(TOKENS, OFFSETS)) == 0.5


def test_verbatim_needs_the_whole_sequence_and_its_end() -> None:
    hashes = sequence_hashes(TOKENS, OFFSETS)
    assert verbatim_fraction([[5, 6, 2], [5, 6], [6, 2], [5, 6, 7, 2], [2], []], hashes) == 3 / 6
    assert verbatim_fraction([], hashes) == 0.0
    assert verbatim_fraction([[5, 6, 2]], sequence_hashes(TOKENS[:0], OFFSETS[:1])) == 0.0


IDS = st.lists(st.integers(0, 3), max_size=3)


@given(st.lists(IDS, min_size=1, max_size=12), st.lists(IDS, min_size=1, max_size=12))
def test_verbatim_equals_membership_in_a_set(training: list[list[int]], samples: list[list[int]]) -> None:
    tokens = np.array([token for sequence in training for token in sequence], dtype=np.uint16)
    offsets = np.cumsum([0] + [len(sequence) for sequence in training])
    known = {tuple(sequence) for sequence in training}
    expected = sum(tuple(sample) in known for sample in samples) / len(samples)
    assert verbatim_fraction(samples, sequence_hashes(tokens, offsets)) == pytest.approx(expected)


def test_words_are_what_white_space_separates_and_the_ends() -> None:
    assert word_count(["the  cat\tsat", "", "no ."]) == 4 + 1 + 3


def test_one_likelihood_in_three_units_by_hand() -> None:
    # "unhappy cats" and "dogs", as pieces un happy cat s </s> and dog s </s>: 8 tokens; 2 + 1 words and 2 ends.
    found = perplexities(12.0, sequences=2, tokens=8, words=word_count(["unhappy cats", "dogs"]))
    assert found == {"nll_per_seq": 6.0, "ppl_per_token": math.exp(1.5), "ppl_per_word": math.exp(12 / 5)}
    # Where the words are the tokens, both perplexities are the same.
    same = perplexities(12.0, sequences=2, tokens=5, words=5)
    assert same["ppl_per_token"] == same["ppl_per_word"]
    assert perplexities(1e6, sequences=2, tokens=8, words=5)["ppl_per_word"] == math.inf


def test_distinct_n_counts_words_as_well() -> None:
    assert distinct_n([["a", "b", "a"], ["a", "b"]], 2) == 2 / 3
