"""Reconstruction scores against sacrebleu called in another way, BLEU's formula by hand, and counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.evaluate.reconstruction import (
    bleu_tokenizer,
    corpus_bleu,
    exact_match,
    score_reconstructions,
    token_accuracy,
)

EOS = 2
REFERENCES = ["the cat sat on the mat", "no , it was n't black monday", "stocks rose N % today ."]
OUTPUTS = ["the cat sat on a mat today", "no , it was n't", "shares rose N % ."]


def test_bleu_by_hand() -> None:
    # 4-grams of 'a b c d e' against 'a b c d f': matches 4 of 5, 3 of 4, 2 of 3, 1 of 2; equal lengths.
    found = corpus_bleu(["a b c d f"], ["a b c d e"], "none")
    assert found["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, rel=1e-12)
    # Four of five words: all n-grams match, and the brevity penalty is exp(1 - 5/4).
    assert corpus_bleu(["a b c d f"], ["a b c d"], "none")["bleu"] == pytest.approx(100 * math.exp(-0.25), rel=1e-12)


@pytest.mark.parametrize("tokenizer", ["none", "13a"])
def test_bleu_is_sacrebleus(tokenizer: str) -> None:
    found = corpus_bleu(REFERENCES, OUTPUTS, tokenizer)
    expected = sacrebleu.corpus_bleu(OUTPUTS, [REFERENCES], tokenize=tokenizer, force=True)
    assert found["bleu"] == pytest.approx(expected.score, rel=1e-12)
    assert 20 < found["bleu"] < 80
    assert found["bleu_signature"] == (
        f"nrefs:1|case:mixed|eff:no|tok:{tokenizer}|smooth:exp|version:{sacrebleu.__version__}"
    )


def test_bleu_is_of_the_corpus_not_the_mean_of_sentences() -> None:
    whole = corpus_bleu(REFERENCES, OUTPUTS, "none")["bleu"]
    single = [corpus_bleu([a], [b], "none")["bleu"] for a, b in zip(REFERENCES, OUTPUTS, strict=True)]
    assert abs(whole - np.mean(single)) > 1


def test_bleu_of_the_text_itself_is_100_and_of_other_words_0() -> None:
    assert corpus_bleu(REFERENCES, REFERENCES, "none")["bleu"] == pytest.approx(100)
    assert corpus_bleu(["a b c d e"], ["f g h i j"], "none")["bleu"] == 0
    assert corpus_bleu(["a b"], [""], "13a")["bleu"] == 0


def test_tokenised_text_is_taken_as_it_is_and_other_text_is_split_by_sacrebleu() -> None:
    texts = ["no , it was n't", "the cat"]
    assert bleu_tokenizer(texts, [[5, 6, 7, 8, 9, EOS], [4, 3, EOS]]) == "none"
    # Pieces of words, and words from which the tokenizer splits punctuation, are not the words of the text.
    assert bleu_tokenizer(texts, [[5, 6, 7, 8, 9, EOS], [4, 3, 3, EOS]]) == "13a"
    assert bleu_tokenizer(["No, it was."], [[5, 6, 7, 8, 9, EOS]]) == "13a"


def test_accuracy_by_hand() -> None:
    # 3 of 4 positions; 2 of 5, for the output is too long; 1 of 4, too short.
    references = [[5, 6, 7, EOS], [5, 6, EOS], [5, 6, 7, EOS]]
    outputs = [[5, 9, 7, EOS], [5, 6, 8, 8, EOS], [5, EOS]]
    assert token_accuracy(references, outputs) == (3 + 2 + 1) / (4 + 5 + 4)
    assert token_accuracy(references[:1], outputs[:1]) == 3 / 4
    assert token_accuracy([], []) == 0.0


def test_an_exact_match_ends_where_the_text_ends() -> None:
    assert exact_match([[5, 6, EOS]] * 4, [[5, 6, EOS], [5, 6], [5, 6, 7, EOS], [5, 7, EOS]]) == 1 / 4
    assert exact_match([np.array([5, 6, EOS])], [[5, 6, EOS]]) == 1.0
    assert exact_match([], []) == 0.0


ROWS = st.lists(st.lists(st.integers(3, 5), max_size=4).map(lambda words: [*words, EOS]), min_size=1, max_size=6)


@given(ROWS)
def test_what_comes_back_whole_scores_1_and_what_is_shifted_does_not(rows: list[list[int]]) -> None:
    assert (token_accuracy(rows, rows), exact_match(rows, rows)) == (1.0, 1.0)
    longer = [[9, *row] for row in rows]
    assert token_accuracy(rows, longer) < 1.0 and exact_match(rows, longer) == 0.0


def test_all_scores_of_one_set() -> None:
    references, outputs = [[5, 6, EOS], [7, EOS]], [[5, 6, EOS], [8, EOS]]
    found = score_reconstructions(references, outputs, ["a b", "c"], ["a b", "d"])
    assert found["sequences"] == 2
    assert (found["token_accuracy"], found["exact_match"]) == (4 / 5, 1 / 2)
    assert found["bleu"] == sacrebleu.corpus_bleu(["a b", "d"], [["a b", "c"]], tokenize="none").score
    assert "tok:none" in found["bleu_signature"]
