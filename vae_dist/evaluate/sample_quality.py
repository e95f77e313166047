"""How good and how varied samples are: Self-BLEU, distinct n-grams, copying, forward and reverse perplexity.

Every value depends on the number of samples, so a passage of samples is compared with passages of the same size: real
text, and text drawn from n-gram models. A row is the token ids of a sequence, its end of sequence last if that was
reached. `Sequences` are (tokens, offsets) as in `evaluate/ngram.py`.

Forward perplexity: a language model of the real training text scores the samples. It is low for fluent samples, and
lowest for a model that says one likely thing again and again. Reverse perplexity: a language model of the samples
scores real held-out text. It is low only if the samples cover what the real text holds (Zhao et al. 2018). Both by
modified Kneser-Ney 5-gram models, unless another scorer is given.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU

from vae_dist.evaluate.ngram import KneserNey, Sequences
from vae_dist.evaluate.reconstruction import Row
from vae_dist.evaluate.text_metrics import distinct_n, perplexities, verbatim_fraction, word_count

# log p of all tokens, the ends of sequence included; nats.
Scorer = Callable[[Sequences], float]

SELF_BLEU_SAMPLES = 1000
_BLEU_ORDER = 4


@dataclass(frozen=True)
class Passage:
    """n sequences: their rows and, pairwise, their texts."""

    rows: Sequence[Row]
    texts: Sequence[str]

    def packed(self) -> Sequences:
        """The rows as (tokens, offsets)."""
        tokens = np.concatenate([np.empty(0, dtype=np.int64), *(np.asarray(row, dtype=np.int64) for row in self.rows)])
        return tokens, np.append(0, np.cumsum([len(row) for row in self.rows], dtype=np.int64))

    def first(self, count: int) -> Passage:
        """The first so many sequences."""
        return Passage(self.rows[:count], self.texts[:count])

    def finished(self, eos_id: int) -> int:
        """How many reach their end of sequence."""
        return sum(len(row) > 0 and int(row[-1]) == eos_id for row in self.rows)

    def perplexities(self, scorer: Scorer, *, eos_id: int) -> dict[str, float]:
        """Of these sequences under `scorer`; the end of a sequence that was cut off is not counted."""
        packed = self.packed()
        words = word_count(self.texts) - len(self.rows) + self.finished(eos_id)
        counts = {"sequences": len(self.rows), "tokens": len(packed[0]), "words": words}
        return perplexities(-scorer(packed), **counts)


@dataclass(frozen=True)
class SampleJudge:
    """What samples are measured with.

    Attributes:
        forward: log-likelihood under a language model of the training text.
        held_out: real text that no model has seen.
        training_hashes: of the training sequences, see `text_metrics.sequence_hashes`.
        bleu_tokenizer: how texts are split into words, see `reconstruction.bleu_tokenizer`.
        reverse: makes a language model of samples.
        eos_id: end of sequence.
    """

    forward: Scorer
    held_out: Passage
    training_hashes: np.ndarray
    bleu_tokenizer: str
    reverse: Callable[[Sequences], KneserNey]
    eos_id: int

    def measure(self, sample: Passage, reverse_of: Passage | None = None) -> dict[str, Any]:
        """All values of one passage; units in the names, lengths with the end of sequence.

        Args:
            sample: at least two sequences.
            reverse_of: what the reverse model learns instead of `sample`. The real text's own row needs it, because
                its sample is held-out text.
        """
        words = split_words(sample.texts, self.bleu_tokenizer)
        forward = sample.perplexities(self.forward, eos_id=self.eos_id)
        reverse_model = self.reverse((reverse_of or sample).packed())
        reverse = self.held_out.perplexities(reverse_model.log_probability, eos_id=self.eos_id)
        units = ("ppl_per_token", "ppl_per_word")
        return {
            "sequences": len(sample.rows),
            "self_bleu": self_bleu(words[:SELF_BLEU_SAMPLES]),
            **{f"distinct_{n}": distinct_n(words, n) for n in (1, 2, 3)},
            "verbatim_fraction": verbatim_fraction(sample.rows, self.training_hashes),
            "tokens_per_seq": len(sample.packed()[0]) / len(sample.rows),
            "finished_fraction": sample.finished(self.eos_id) / len(sample.rows),
            **{f"forward_{unit}": forward[unit] for unit in units},
            **{f"reverse_{unit}": reverse[unit] for unit in units},
        }


def split_words(texts: Sequence[str], tokenizer: str) -> list[list[str]]:
    """The words of each text by one of sacrebleu's tokenizers."""
    split = BLEU(tokenize=tokenizer).tokenizer
    return [split(text.rstrip()).split() for text in texts]


def self_bleu(sentences: Sequence[Sequence[str]]) -> float:
    """Mean BLEU-4 of each sentence with all the others as its references, 0 (all differ) to 100 (all alike).

    Zhu et al. 2018 (Texygen). The BLEU of a sentence is sacrebleu's `sentence_score` with effective order and
    exponential smoothing. Its counts are taken here, all sentences at once: what the others hold is what all hold
    but for the sentence itself, which makes the cost linear in the number of sentences.

    Args:
        sentences: words of at least two sentences.
    """
    if len(sentences) < 2:
        raise ValueError(f"Self-BLEU compares at least two sentences, got {len(sentences)}")
    counts = [_ngrams(words) for words in sentences]
    most: dict[tuple[str, ...], tuple[int, int]] = {}
    for counted in counts:
        for gram, count in counted.items():
            first, second = most.get(gram, (0, 0))
            most[gram] = (count, first) if count > first else (first, max(second, count))
    lengths = Counter(len(words) for words in sentences)
    total = sum(
        _sentence_bleu(len(words), counted, most, lengths) for words, counted in zip(sentences, counts, strict=True)
    )
    return total / len(sentences)


def _sentence_bleu(
    length: int, counted: Counter[tuple[str, ...]], most: dict[tuple[str, ...], tuple[int, int]], lengths: Counter[int]
) -> float:
    """BLEU of one sentence; `most` has the two largest counts of an n-gram in any sentence."""
    correct, total = [0] * _BLEU_ORDER, [0] * _BLEU_ORDER
    for gram, count in counted.items():
        first, second = most[gram]
        total[len(gram) - 1] += count
        correct[len(gram) - 1] += min(count, second if count == first else first)
    reference = _closest_other(length, lengths)
    score = BLEU.compute_bleu(correct, total, length, reference, smooth_method="exp", effective_order=True)
    return float(score.score)


def _closest_other(length: int, lengths: Counter[int]) -> int:
    """Of the other sentences' lengths the closest, the shorter of two."""
    if lengths[length] > 1:
        return length
    others = sorted(other for other in lengths if other != length)
    at = bisect_left(others, length)
    return min(others[max(0, at - 1) : at + 1], key=lambda other: (abs(other - length), other))


def _ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    orders = range(1, _BLEU_ORDER + 1)
    return Counter(tuple(words[i : i + n]) for n in orders for i in range(len(words) - n + 1))
