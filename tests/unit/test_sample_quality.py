"""Self-BLEU against sacrebleu's own sentence scores; forward and reverse perplexity on text whose order is known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from vae_dist.evaluate.ngram import KneserNey
from vae_dist.evaluate.sample_quality import Passage, SampleJudge, self_bleu, split_words
from vae_dist.evaluate.text_metrics import distinct_n, sequence_hashes

BOS, EOS, FIRST, WORDS = 1, 2, 4, 60
VOCAB = FIRST + WORDS


def slow_self_bleu(texts: list[str], tokenizer: str = "none") -> float:
    """The definition: sacrebleu scores each text with all others as its references."""
    metric = BLEU(tokenize=tokenizer, effective_order=True)
    return float(np.mean([metric.sentence_score(t, texts[:i] + texts[i + 1 :]).score for i, t in enumerate(texts)]))


SENTENCE = st.lists(st.sampled_from("abcd"), max_size=7).map(" ".join)


@given(st.lists(SENTENCE, min_size=2, max_size=7))
def test_self_bleu_is_the_mean_of_sacrebleus_sentence_scores(texts: list[str]) -> None:
    assert self_bleu(split_words(texts, "none")) == pytest.approx(slow_self_bleu(texts), rel=1e-12)


def test_self_bleu_splits_text_as_sacrebleu_does() -> None:
    texts = ["The cat, it sat.", "The cat sat, it did.", "It's 3.5% today; the cat's <unk>!", "The cat, it sat."]
    assert self_bleu(split_words(texts, "13a")) == pytest.approx(slow_self_bleu(texts, "13a"), rel=1e-12)
    assert split_words(["Well, 3.5% of it. "], "13a") == [["Well", ",", "3.5", "%", "of", "it", "."]]


def test_self_bleu_of_one_sentence_again_and_again_is_100_and_of_others_0() -> None:
    assert self_bleu([["a", "b", "c", "d", "e"]] * 20) == pytest.approx(100)
    # A sentence shorter than four words counts the orders it has.
    assert self_bleu([["a", "b"]] * 3) == pytest.approx(100)
    assert self_bleu([[f"{i}{c}" for c in "abcde"] for i in range(20)]) == 0
    with pytest.raises(ValueError, match="at least two sentences, got 1"):
        self_bleu([["a"]])


def test_self_bleu_of_many_samples_takes_no_square_time() -> None:
    rng = np.random.default_rng(0)
    sentences = [[str(i) for i in rng.zipf(1.3, size=22) % 1000] for _ in range(1000)]
    started = time.process_time()
    value = self_bleu(sentences)
    # A thousand sentences against each other are a million pairs; this bound is several times what is measured.
    assert time.process_time() - started < 10
    assert 0 < value < 100


def shuffled_words(words: list[int]) -> list[int]:
    return np.random.default_rng(len(words)).permutation(words).tolist()


def chain(seed: int, count: int, order: Callable[[list[int]], list[int]] = list) -> Passage:
    """Sequences of a fixed Markov chain over WORDS words, each with four successors; `order` rearranges the words."""
    successors = np.random.default_rng(99).integers(0, WORDS, (WORDS, 4))
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = [int(rng.integers(WORDS))]
        while rng.random() > 0.1:
            words.append(int(successors[words[-1], rng.choice(4, p=[0.6, 0.2, 0.15, 0.05])]))
        rows.append([*(FIRST + word for word in order(words)), EOS])
    return Passage(rows, [" ".join(map(str, row[:-1])) for row in rows])


TRAINING, HELD_OUT, COUNT = chain(1, 3000), chain(2, 800), 800
ESTIMATE = partial(KneserNey, vocab_size=VOCAB, order=3, bos_id=BOS, excluded_ids=(0, 3))


@pytest.fixture(scope="module")
def judge() -> SampleJudge:
    forward = ESTIMATE(TRAINING.packed())
    return SampleJudge(
        forward=forward.log_probability,
        held_out=HELD_OUT,
        training_hashes=sequence_hashes(*TRAINING.packed()),
        bleu_tokenizer="none",
        reverse=ESTIMATE,
        eos_id=EOS,
    )


def test_real_text_as_samples_has_the_perplexity_of_real_text(judge: SampleJudge) -> None:
    found = judge.measure(chain(3, COUNT))
    real = judge.measure(HELD_OUT, chain(4, COUNT))
    for name in ("forward_ppl_per_token", "reverse_ppl_per_token"):
        assert found[name] == pytest.approx(real[name], rel=0.05), name
    model = ESTIMATE(chain(3, COUNT).packed())
    assert found["reverse_ppl_per_token"] == pytest.approx(model.perplexity(HELD_OUT.packed()), rel=1e-12)
    assert real["forward_ppl_per_token"] == pytest.approx(
        ESTIMATE(TRAINING.packed()).perplexity(HELD_OUT.packed()), rel=1e-12
    )


def test_shuffled_words_are_much_worse_both_ways(judge: SampleJudge) -> None:
    real = judge.measure(chain(3, COUNT))
    shuffled = judge.measure(chain(3, COUNT, shuffled_words))
    assert shuffled["forward_ppl_per_token"] > 3 * real["forward_ppl_per_token"]
    assert shuffled["reverse_ppl_per_token"] > 2 * real["reverse_ppl_per_token"]
    assert shuffled["distinct_1"] == real["distinct_1"], "the words are the same"


def test_one_fluent_sentence_again_and_again_is_found_by_all_but_forward_perplexity(judge: SampleJudge) -> None:
    real = judge.measure(chain(3, COUNT))
    best = max(TRAINING.rows[:200], key=lambda row: judge.forward(Passage([row], [""]).packed()) / len(row))
    collapsed = judge.measure(Passage([best] * COUNT, [" ".join(map(str, best[:-1]))] * COUNT))
    assert collapsed["forward_ppl_per_token"] < real["forward_ppl_per_token"]
    assert collapsed["reverse_ppl_per_token"] > 3 * real["reverse_ppl_per_token"]
    assert collapsed["self_bleu"] == pytest.approx(100) and real["self_bleu"] < 99
    assert collapsed["verbatim_fraction"] == 1.0


def test_the_other_columns_by_hand(judge: SampleJudge) -> None:
    # Two finished sequences of 3 and 2 tokens, one of them in the training text, and one cut off after 2.
    known = TRAINING.rows[0]
    rows = [[FIRST, FIRST + 1, EOS], known, [FIRST, FIRST + 1]]
    sample = Passage(rows, ["a b", " ".join("w" for _ in known[:-1]), "a b"])
    found = judge.measure(sample)
    tokens = 3 + len(known) + 2
    assert found["sequences"] == 3
    assert found["tokens_per_seq"] == pytest.approx(tokens / 3)
    assert found["finished_fraction"] == pytest.approx(2 / 3)
    assert found["verbatim_fraction"] == pytest.approx(1 / 3)
    words = split_words(sample.texts, "none")
    assert [found[f"distinct_{n}"] for n in (1, 2, 3)] == [distinct_n(words, n) for n in (1, 2, 3)]
    nll = -judge.forward(sample.packed())
    assert found["forward_ppl_per_token"] == pytest.approx(math.exp(nll / tokens))
    # Words: as many as tokens, for the end that was not reached is not counted.
    assert found["forward_ppl_per_word"] == pytest.approx(math.exp(nll / tokens))


def test_any_scorer_can_judge_fluency(judge: SampleJudge) -> None:
    uniform = SampleJudge(
        lambda sequences: -len(sequences[0]) * math.log(7), HELD_OUT, judge.training_hashes, "none", ESTIMATE, EOS
    )
    sample = Passage([[FIRST, FIRST + 1, EOS], [FIRST, EOS]], ["ab", "a"])
    found = uniform.measure(sample)
    assert found["forward_ppl_per_token"] == pytest.approx(7)
    # Five tokens, but two words and two ends.
    assert found["forward_ppl_per_word"] == pytest.approx(7 ** (5 / 4))


def test_self_bleu_of_real_newspaper_text(ptb: Path) -> None:
    texts = (ptb / "valid.txt").read_text(encoding="utf-8").splitlines()[:40]
    assert self_bleu(split_words(texts, "none")) == pytest.approx(slow_self_bleu(texts), rel=1e-12)
