"""The evaluation of what a model writes, after training, in one process: reconstructions, samples, interpolations.

Real text is a random choice of the held-out sequences given; the same choice serves all three. Texts are decoded with
<unk> allowed, unless the options say otherwise: what is measured is the model's own distribution.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from vae_dist.data.text.special_ids import BOS_ID, EOS_ID, PAD_ID
from vae_dist.data.text.tokenizer import Tokenizer
from vae_dist.decode.latent_ops import TextModel
from vae_dist.decode.request import Decoding
from vae_dist.errors import DataError
from vae_dist.evaluate.ngram import KneserNey, Sequences
from vae_dist.evaluate.reconstruction import bleu_tokenizer, score_reconstructions
from vae_dist.evaluate.sample_quality import Passage, Row, SampleJudge, Scorer
from vae_dist.evaluate.smoothness import smoothness
from vae_dist.evaluate.text_metrics import sequence_hashes


@dataclass(frozen=True)
class TextOptions:
    """How much is written and measured.

    Attributes:
        seed: of the choice of held-out sequences and of all samples.
        sequences: samples, reconstructions and real sequences, at most (as many as the data has).
        pairs, steps: interpolations, and steps of each.
        shown: samples, reconstructions that are kept as text; and a tenth as many interpolations.
        batch_sequences: decoded at once.
        ngram_order: of the language models behind forward and reverse perplexity.
        allow_unknown: let the model write <unk>.
    """

    seed: int = 0
    sequences: int = 1000
    pairs: int = 50
    steps: int = 10
    shown: int = 20
    batch_sequences: int = 128
    ngram_order: int = 5
    allow_unknown: bool = True


def evaluate_texts(
    model: TextModel,
    held_out: Sequences,
    training: Sequences,
    options: TextOptions,
    forward: tuple[str, Scorer] | None = None,
) -> dict[str, Any]:
    """Sections by name, each with its number of sequences and its seed; what the data is too small for is left out.

    Args:
        model: in eval mode.
        held_out: sequences the model has not seen, (tokens, offsets); texts without a word are not chosen.
        training: what the model was trained on, or enough of it; the n-gram models and the check for copies use it.
        options: sizes and seed.
        forward: name and scorer of a language model for the forward perplexity, such as one with the same decoder;
            default: the Kneser-Ney model of `training`.

    Returns:
        ngram_baselines, samples and sample_quality; with a latent also reconstruction and interpolation.

    Raises:
        DataError: there is no held-out or no training sequence.
    """
    if len(held_out[1]) < 2 or len(training[1]) < 2:
        raise DataError("There is no text to compare with: evaluation needs held-out and training sequences.")
    evaluation = _TextEvaluation(model, held_out, training, options)
    sections = {"ngram_baselines": evaluation.ngram_baselines(), **evaluation.samples(forward)}
    if model.vae.config.latent != "none":
        sections |= evaluation.reconstruction() | evaluation.interpolation()
    return sections


class _TextEvaluation:
    """What the sections share: the texts that were chosen, and the n-gram models."""

    def __init__(self, model: TextModel, held_out: Sequences, training: Sequences, options: TextOptions) -> None:
        self._model, self._training, self._options = model, training, options
        self._held_out = _passage(held_out, np.arange(len(held_out[1]) - 1), model.tokenizer)
        # Every row of the table of sample quality has as many sequences.
        self._real = _choose(self._held_out, min(options.sequences, len(training[1]) - 1), options.seed)
        self._estimate = partial(
            KneserNey, vocab_size=model.tokenizer.vocab_size, bos_id=BOS_ID, excluded_ids=(PAD_ID,)
        )
        self._ngrams = {
            "Unigram": self._estimate(training, order=1, modified=False),
            "Kneser-Ney bigram": self._estimate(training, order=2, modified=False),
            self._best_name: self._estimate(training, order=options.ngram_order),
        }

    def ngram_baselines(self) -> dict[str, Any]:
        """Perplexities of the n-gram models on all held-out sequences."""
        rows = [
            {"name": name, **self._held_out.perplexities(one.log_probability, eos_id=EOS_ID)}
            for name, one in self._ngrams.items()
        ]
        return {
            "training_sequences": len(self._training[1]) - 1,
            "held_out_sequences": len(self._held_out.rows),
            "rows": rows,
        }

    def samples(self, forward: tuple[str, Scorer] | None) -> dict[str, Any]:
        """The sections samples and sample_quality."""
        options, count = self._options, len(self._real.rows)
        drawn = max(count, options.shown)
        # Samples have consecutive seeds; those of two values of `seed` do not overlap.
        first, decoding = options.seed * drawn, self._decoding(temperature=1.0)
        samples = self._sample(first, drawn, decoding)
        section = {
            "sequences": drawn,
            "seed_first": first,
            "decoding": asdict(decoding),
            "texts": list(samples.texts[: options.shown]),
        }
        if count < 2:
            return {"samples": section}
        return {"samples": section, "sample_quality": self._sample_quality(samples.first(count), forward)}

    def reconstruction(self) -> dict[str, Any]:
        """The section of that name: from the posterior mean, greedily."""
        model, options, real = self._model, self._options, self._real
        given, rows, texts = [], [], []
        greedy = self._decoding(temperature=0.0)
        for start in range(0, len(real.texts), options.batch_sequences):
            part = real.texts[start : start + options.batch_sequences]
            given += [text.ids.tolist() for text in model.encode(part)]
            some_texts, some_rows = model.reconstruct(part, options.seed, greedy)
            texts += some_texts
            rows += [row.tokens for row in some_rows]
        if not given:
            return {}
        examples = [{"input": a, "output": b} for a, b in zip(real.texts, texts, strict=True)]
        scores = score_reconstructions(given, rows, real.texts, texts)
        return {"reconstruction": {**scores, "seed": options.seed, "examples": examples[: options.shown]}}

    def interpolation(self) -> dict[str, Any]:
        """The section of that name: from the first chosen text to the second, the third to the fourth, and so on."""
        options = self._options
        texts = self._real.texts[: min(2 * options.pairs, len(self._real.texts) // 2 * 2)]
        paths, nll, examples = [], [], []
        for a, b in zip(texts[::2], texts[1::2], strict=True):
            greedy = self._decoding(temperature=0.0)
            t, between, rows, *_ = self._model.interpolate(a, b, options.steps + 1, "linear", options.seed, greedy)
            paths.append([row.tokens for row in rows])
            nll.append([-row.log_prob / max(1, len(row.tokens)) for row in rows])
            points = [{"t": at, "text": text} for at, text in zip(t, between, strict=True)]
            examples.append({"a": a, "b": b, "points": points})
        if not paths:
            return {}
        # JSON has no NaN.
        found = {name: None if math.isnan(value) else value for name, value in smoothness(paths, nll).items()}
        shown = examples[: max(1, options.shown // 10)]
        return {"interpolation": {**found, "seed": options.seed, "examples": shown}}

    def _sample_quality(self, samples: Passage, forward: tuple[str, Scorer] | None) -> dict[str, Any]:
        """A row each for the model, real text, and the n-gram models that look at a context."""
        count, seed, tokenizer = len(self._real.rows), self._options.seed, self._model.tokenizer
        forward_name, scorer = forward or (self._best_name, self._ngrams[self._best_name].log_probability)
        judge = SampleJudge(
            forward=scorer,
            held_out=self._held_out,
            training_hashes=sequence_hashes(*self._training),
            bleu_tokenizer=bleu_tokenizer(self._held_out.texts, self._held_out.rows),
            reverse=partial(self._estimate, order=self._options.ngram_order),
            eos_id=EOS_ID,
        )
        learnt = np.random.default_rng(seed).permutation(len(self._training[1]) - 1)[:count]
        rows = [
            {"name": "This model", **judge.measure(samples)},
            {"name": "Real text", **judge.measure(self._real, _passage(self._training, learnt, tokenizer))},
        ]
        for name, ngram in self._ngrams.items():
            if ngram.order > 1:
                drawn = ngram.sample(count, seed=seed, eos_id=EOS_ID, max_tokens=self._model.max_tokens)
                rows.append({"name": name, **judge.measure(_passage(drawn, np.arange(count), tokenizer))})
        return {
            "sequences": count,
            "seed": seed,
            "training_sequences": len(self._training[1]) - 1,
            "held_out_sequences": len(self._held_out.rows),
            "forward_model": forward_name,
            "reverse_model": self._best_name,
            "bleu_tokenizer": judge.bleu_tokenizer,
            "rows": rows,
        }

    def _sample(self, first: int, count: int, decoding: Decoding) -> Passage:
        rows: list[Row] = []
        texts: list[str] = []
        for start in range(0, count, self._options.batch_sequences):
            size = min(self._options.batch_sequences, count - start)
            some_texts, some_rows, *_ = self._model.sample(size, first + start, decoding)
            texts += some_texts
            rows += [row.tokens for row in some_rows]
        return Passage(rows, texts)

    def _decoding(self, temperature: float) -> Decoding:
        return Decoding(
            temperature=temperature, max_tokens=self._model.max_tokens, allow_unknown=self._options.allow_unknown
        )

    @property
    def _best_name(self) -> str:
        return f"Kneser-Ney {self._options.ngram_order}-gram"


def _choose(real: Passage, count: int, seed: int) -> Passage:
    """A random choice among the texts that hold a word."""
    order = np.random.default_rng(seed).permutation(len(real.rows))
    kept = [i for i in order.tolist() if real.texts[i].strip()][:count]
    return Passage([real.rows[i] for i in kept], [real.texts[i] for i in kept])


def _passage(sequences: Sequences, numbers: np.ndarray, tokenizer: Tokenizer) -> Passage:
    tokens, offsets = sequences
    rows: list[Row] = [tokens[offsets[i] : offsets[i + 1]] for i in numbers.tolist()]
    return Passage(rows, [tokenizer.decode(row) for row in rows])
