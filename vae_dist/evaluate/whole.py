"""The evaluation of a model on a split, in one process: its likelihood and latent, and if asked for what it writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.store.split import Split, read_all
from vae_dist.data.stream.batch import collate
from vae_dist.decode.latent_ops import TextModel
from vae_dist.errors import DataError, ModelError
from vae_dist.evaluate.latent import ACTIVE_UNIT_THRESHOLD, variance_of_mean
from vae_dist.evaluate.likelihood import Scores, score_split, summarise
from vae_dist.evaluate.text_metrics import perplexities, word_count
from vae_dist.evaluate.texts import TextOptions, evaluate_texts
from vae_dist.export.model_dir import LoadedModel

# What the n-gram models and the check for copies read of the training split.
TRAINING_TOKENS = 20_000_000
_DECODED_AT_ONCE = 8192


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how.

    Attributes:
        importance_samples: K of the importance-weighted bound; 0 leaves it out.
        fitted_prior: take the prior that was fitted after training.
        autocast: compute dtype, or None for float32.
        texts: also write and measure texts.
        language_model: a model without a latent that judges the samples, in place of n-grams.
    """

    split: str = "test"
    seed: int = 0
    batch_sequences: int = 64
    max_sequences: int | None = None
    importance_samples: int = 0
    fitted_prior: bool = False
    autocast: torch.dtype | None = None
    texts: bool = False
    language_model: LoadedModel | None = None


def evaluate_model(loaded: LoadedModel, dataset: Dataset, wanted: Evaluation) -> dict[str, Any]:
    """Everything that is known of a model on a split, fit for JSON and for `observe.evaluation_page`.

    Raises:
        DataError: the data set has another tokenizer.
        ModelError: there is no fitted prior, or the language model has a latent.
    """
    _check(loaded, dataset, wanted)
    split = dataset.split(wanted.split)
    scores = score_split(
        loaded.vae,
        split,
        seed=wanted.seed,
        batch_sequences=wanted.batch_sequences,
        importance_samples=wanted.importance_samples,
        max_sequences=wanted.max_sequences,
        fitted_prior=wanted.fitted_prior,
        autocast=wanted.autocast,
    )
    assert scores is not None
    found: dict[str, Any] = {
        "title": f"Evaluation of {loaded.info['provenance'].get('run', loaded.path.name)}",
        "model": str(loaded.path),
        "data": dataset.path,
        "split": wanted.split,
        "seed": wanted.seed,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "scores": {
            "prior": "fitted mixture" if wanted.fitted_prior else loaded.vae.trained_prior_name,
            "precision": "bf16" if wanted.autocast else "fp32",
            "importance_samples": wanted.importance_samples,
            **summarise(scores),
            **_per_word(scores, split, dataset),
        },
    }
    if loaded.vae.latent_dim:
        found["active_unit_threshold"] = ACTIVE_UNIT_THRESHOLD
        found["variance_of_posterior_mean_per_dim"] = variance_of_mean(scores.mean).tolist()
    return found | (_texts(loaded, dataset, split, wanted) if wanted.texts else {})


def _check(loaded: LoadedModel, dataset: Dataset, wanted: Evaluation) -> None:
    for model in (loaded, wanted.language_model):
        if model is not None and dataset.tokenizer.sha256 != model.tokenizer.sha256:
            raise DataError(
                f"{dataset.path} was prepared with another tokenizer than {model.path} was trained with. Prepare it "
                f"with `--tokenizer {model.path / 'tokenizer.json'}`."
            )
    if wanted.fitted_prior and loaded.vae.sampling_prior is None:
        raise ModelError(
            f"{loaded.path} has no fitted prior. Train with model.sampling_components=64, or take its own prior."
        )
    if wanted.language_model is not None and wanted.language_model.vae.latent_dim:
        raise ModelError(
            f"{wanted.language_model.path} has a latent, and a judge of samples must give exact probabilities. Train a "
            "language model with model.latent=none."
        )


def _per_word(scores: Scores, split: Split, dataset: Dataset) -> dict[str, Any]:
    """Perplexities per word, which can be compared between tokenizers; the bound's if it was asked for."""
    words = sum(word_count(map(dataset.tokenizer.decode, rows)) for rows in _read(split, scores.number))
    counts = {"sequences": len(scores.number), "tokens": int(scores.tokens.sum()), "words": words}
    bounds = {"ppl_per_word": float((scores.rec + scores.kl).sum())}
    if not np.isnan(scores.iw_log_likelihood).any():
        bounds["iw_ppl_per_word"] = -float(scores.iw_log_likelihood.sum())
    return {"words": words} | {name: perplexities(nll, **counts)["ppl_per_word"] for name, nll in bounds.items()}


def _read(split: Split, numbers: np.ndarray) -> Iterator[Sequences]:
    """The sequences of these (sorted) numbers, in pieces."""
    for start in range(0, split.sequences, _DECODED_AT_ONCE):
        inside = numbers[(numbers >= start) & (numbers < start + _DECODED_AT_ONCE)]
        if len(inside):
            yield split.read(start, min(_DECODED_AT_ONCE, split.sequences - start)).take(inside - start)


def _texts(loaded: LoadedModel, dataset: Dataset, split: Split, wanted: Evaluation) -> dict[str, Any]:
    judge = wanted.language_model
    return evaluate_texts(
        TextModel(loaded.vae, loaded.tokenizer, loaded.max_tokens),
        read_all(split, TRAINING_TOKENS),
        read_all(dataset.split("train"), TRAINING_TOKENS),
        TextOptions(seed=wanted.seed, batch_sequences=wanted.batch_sequences),
        None if judge is None else (judge.path.name, partial(_log_probability, judge, wanted)),
    )


@torch.no_grad()
def _log_probability(judge: LoadedModel, wanted: Evaluation, sequences: tuple[np.ndarray, np.ndarray]) -> float:
    """log p of all sequences together under a language model, nats."""
    whole = Sequences(*sequences)
    device, total = judge.vae.output_bias.device, 0.0
    rng = torch.zeros(2, dtype=torch.int64, device=device)
    by_length = np.argsort(whole.lengths, kind="stable")
    for start in range(0, len(by_length), wanted.batch_sequences):
        rows = by_length[start : start + wanted.batch_sequences]
        batch = collate(whole.take(rows), rows).to(device)
        with torch.autocast(device.type, wanted.autocast, enabled=wanted.autocast is not None):
            total -= float(judge.vae(batch, rng).rec_KB.double().sum())
    return total
