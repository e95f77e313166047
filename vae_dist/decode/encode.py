"""Texts in: encoding and scoring in batches of few shapes, so that a text's numbers do not depend on its company.

Shapes: B sequences, T positions, D latent.

Texts are grouped by length, in steps of eight (of one where every token has a latent), and every batch has sixteen
rows: what is missing is filled up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import Batch, collate
from vae_dist.data.text.special_ids import EOS_ID
from vae_dist.decode.request import Generated
from vae_dist.errors import DataError
from vae_dist.model.importance import draw_importance_samples
from vae_dist.model.vae import TextVAE

SCORE_STREAM = 7
_ROWS = 16
_STEP = 8


@dataclass(frozen=True)
class Encoded:
    """A text and its posterior.

    Attributes:
        ids: its tokens, the end of sequence included.
        truncated: whether it was longer than the model's longest sequence.
        mean, logvar: float32 [D], or [T, D] where every token has a latent.
    """

    ids: np.ndarray
    truncated: bool
    mean: torch.Tensor
    logvar: torch.Tensor


@torch.inference_mode()
def encode(vae: TextVAE, ids: Sequence[np.ndarray], truncated: Sequence[bool]) -> list[Encoded]:
    """The posterior of each text, in the order given.

    Raises:
        DataError: the model has no latent.
    """
    if vae.encoder is None:
        raise DataError(
            "This model is a plain language model (model.latent = none): it samples, but has no latent to encode "
            "texts into. Train with model.latent=sequence."
        )
    found: dict[int, Encoded] = {}
    for numbers, batch in _batches(vae, ids):
        mean, logvar = vae.encode(batch)
        for row, number in enumerate(numbers):
            keep = slice(len(ids[number])) if vae.per_token else ...
            found[number] = Encoded(ids[number], truncated[number], mean[row][keep], logvar[row][keep])
    return [found[number] for number in range(len(ids))]


@torch.inference_mode()
def score(vae: TextVAE, pairs: Sequence[tuple[Encoded, Generated]]) -> list[dict[str, Any]]:
    """How well each text is understood: from its posterior mean, and against its reconstruction.

    Returns:
        per text: truncated; token_accuracy, share of positions where the reconstruction has the text's token;
        nll_per_token, -log p(x | z = posterior mean) in nats; kl_per_seq in nats.
    """
    found: dict[int, dict[str, Any]] = {}
    for numbers, batch in _batches(vae, [text.ids for text, _ in pairs]):
        mean, _ = vae.encode(batch)
        # A KL without a closed form is one draw: all rows have the id 0, so that a text's is the same in any company.
        output = vae(batch, torch.zeros(2, dtype=torch.int64, device=mean.device), z=mean)
        for row, number in enumerate(numbers):
            (text, written), length = pairs[number], len(pairs[number][0].ids)
            same = sum(a == b for a, b in zip(text.ids.tolist(), written.tokens, strict=False))
            found[number] = {
                "truncated": text.truncated,
                "token_accuracy": same / max(length, len(written.tokens)),
                "nll_per_token": float(output.rec_KB[0, row]) / length,
                "kl_per_seq": float(output.latent.kl[row]),
            }
    return [found[number] for number in range(len(pairs))]


@torch.inference_mode()
def likelihood(vae: TextVAE, texts: Sequence[Encoded], samples: int) -> list[dict[str, Any]]:
    """-ELBO and the importance-weighted bound of each text, nats, as `evaluate/likelihood.py` defines them.

    Every text has the same noise, so that its numbers are its own in any company.

    Returns:
        per text: tokens; elbo, minus the mean over the samples of rec + KL; kl; iw_nll, minus the bound.
    """
    found: dict[int, dict[str, Any]] = {}
    for numbers, batch in _batches(vae, [text.ids for text in texts]):
        drawn = draw_importance_samples(vae, batch, 0, samples, stream=SCORE_STREAM)
        rec_KB, kl_B, iw_B = drawn.rec_KB, drawn.first.latent.kl.double(), drawn.log_likelihood()
        for row, number in enumerate(numbers):
            found[number] = {
                "tokens": len(texts[number].ids),
                "elbo": -float(rec_KB[:, row].mean() + kl_B[row]),
                "kl": float(kl_B[row]),
                "iw_nll": -float(iw_B[row]),
            }
    return [found[number] for number in range(len(texts))]


def _batches(vae: TextVAE, ids: Sequence[np.ndarray]) -> Iterator[tuple[list[int], Batch]]:
    """Numbers of texts, and the batch whose first rows they are."""
    step = 1 if vae.per_token else _STEP
    buckets = defaultdict(list)
    for number, one in enumerate(ids):
        buckets[-(-len(one) // step) * step].append(number)
    for length, numbers in sorted(buckets.items()):
        filler = np.full(length, EOS_ID, dtype=np.int64)
        # One row at least is filled, so that the batch is as long as its bucket.
        for start in range(0, len(numbers), _ROWS - 1):
            part = numbers[start : start + _ROWS - 1]
            rows = [ids[number] for number in part] + [filler] * (_ROWS - len(part))
            batch = collate(Sequences.from_list(rows), np.zeros(_ROWS, dtype=np.int64))
            yield part, batch.to(vae.output_bias.device)
