"""Scoring a split: -ELBO, importance-weighted NLL, and the quantities that show whether the latent is used.

Definitions (nats, sums over a sequence's tokens, the end-of-sequence token counted, BOS and padding not):

    rec = -log p(x | z), z ~ q(z | x)    kl = KL(q(z | x) || p(z)), see `model/latent.py`    elbo = -(rec + kl)
    iw  = logsumexp_k [log p(x | z_k) + log p(z_k) - log q(z_k | x)] - log K    (Burda et al. 2016)

Perplexities divide by the number of predicted tokens. The same code runs on one process and, each rank scoring
its share, on all workers of a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vae_dist.config.model_schema import VmfConfig
from vae_dist.data.store.split import Split
from vae_dist.data.stream.batch import Batch, collate
from vae_dist.data.stream.order import mix, permute
from vae_dist.data.stream.stream import gather
from vae_dist.evaluate.latent import MUTUAL_INFORMATION_LATENTS, active_units, kl_per_dim, mutual_information
from vae_dist.model.importance import draw_importance_samples
from vae_dist.model.vae import TextVAE, VaeOutput

EVALUATION_STREAM = 2
_WINDOW_SEQUENCES = 8192
_BLOCK_SEQUENCES = 256


@dataclass(frozen=True)
class Scores:
    """Per-sequence results of n sequences with r latents, D dimensions each: r = n, or a latent a token.

    Attributes:
        number: int64[n], sequence numbers in the split.
        tokens: int64[n], predicted tokens.
        rec, kl: float64[n], nats; rec is the mean over the samples drawn.
        iw_log_likelihood: float64[n], nats; NaN where no importance samples were asked for.
        row_number: int64[r], the sequence of each latent.
        mean, logvar, z: float32[r, D], posterior parameters and one sample.
        has_dimensions: whether the KL is a sum over dimensions, as it is between a Gaussian and N(0, I).
        concentration: of a von Mises-Fisher posterior; None for Gaussians.
    """

    number: np.ndarray
    tokens: np.ndarray
    rec: np.ndarray
    kl: np.ndarray
    iw_log_likelihood: np.ndarray
    row_number: np.ndarray
    mean: np.ndarray
    logvar: np.ndarray
    z: np.ndarray
    has_dimensions: bool = True
    concentration: float | None = None

    @staticmethod
    def concatenate(parts: list[Scores]) -> Scores:
        """All parts, ordered by sequence number."""

        def joined(names: tuple[str, ...], key: str) -> dict[str, np.ndarray]:
            order = np.argsort(np.concatenate([getattr(p, key) for p in parts]), kind="stable")
            return {name: np.concatenate([getattr(p, name) for p in parts])[order] for name in names}

        of_sequences = joined(("number", "tokens", "rec", "kl", "iw_log_likelihood"), "number")
        of_latents = joined(("row_number", "mean", "logvar", "z"), "row_number")
        return Scores(
            **of_sequences, **of_latents, has_dimensions=parts[0].has_dimensions, concentration=parts[0].concentration
        )


@torch.no_grad()
def score_split(
    vae: TextVAE,
    split: Split,
    *,
    seed: int,
    batch_sequences: int,
    importance_samples: int = 0,
    max_sequences: int | None = None,
    fitted_prior: bool = False,
    autocast: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Scores | None:
    """Score a split, or a random `max_sequences` of it, on this process or over all ranks of the process group.

    Args:
        vae: the model; put into eval mode for the duration.
        seed: of the latent noise and of the choice of sequences.
        batch_sequences: sequences in a batch of one rank.
        importance_samples: K of the importance-weighted bound; 0 leaves it out. They are drawn in chunks, so memory
            does not grow with K.
        fitted_prior: KL and importance weights are those of the mixture that was fitted after training.
        autocast: compute dtype, or None for the weights' own.
        rank, world_size: with a world size above 1 this is a collective call.

    Returns:
        the scores of all ranks on rank 0, None elsewhere.
    """
    device = next(vae.parameters()).device
    was_training = vae.training
    vae.eval()
    parts = []
    for numbers, batch in split_batches(split, seed, batch_sequences, max_sequences, rank, world_size):
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            parts.append(_score_batch(vae, numbers, batch.to(device), seed, importance_samples, fitted_prior))
    vae.train(was_training)
    return _gather(Scores.concatenate(parts), rank, world_size)


def summarise(scores: Scores) -> dict[str, Any]:
    """Averages of `scores` under the names every metric of this project uses; units are in the names."""
    count, tokens = len(scores.number), int(scores.tokens.sum())
    rec, kl = math.fsum(scores.rec) / count, math.fsum(scores.kl) / count
    summary: dict[str, Any] = {
        "elbo_per_seq": -(rec + kl),
        "rec_per_seq": rec,
        "kl_per_seq": kl,
        "nll_per_token": (rec + kl) * count / tokens,
        "ppl": _exp((rec + kl) * count / tokens),
        "active_units": active_units(scores.mean),
        "mutual_information_nats": mutual_information(scores.mean, scores.logvar, scores.z, scores.concentration),
        "mutual_information_latents": min(len(scores.mean), MUTUAL_INFORMATION_LATENTS),
        "sequences": count,
        "tokens": tokens,
    }
    if not np.isnan(scores.iw_log_likelihood).any():
        iw_nll = -math.fsum(scores.iw_log_likelihood) / count
        summary |= {"iw_nll_per_seq": iw_nll, "iw_ppl": _exp(iw_nll * count / tokens)}
    if scores.has_dimensions:
        summary["kl_per_dim"] = kl_per_dim(scores.mean, scores.logvar).tolist()
    return summary


def swapped_rec_per_seq(
    vae: TextVAE,
    split: Split,
    scores: Scores,
    *,
    seed: int,
    batch_sequences: int,
    autocast: torch.dtype | None = None,
) -> float:
    """Mean rec (nats per sequence) when each sequence is decoded with another one's z; single process, a z a sequence.

    The other sequence is the next one in a random cyclic order, so no sequence keeps its own z.
    """
    count = len(scores.number)
    cycle = permute(np.arange(count), count, mix(seed, 5))
    other = np.empty(count, dtype=np.int64)
    other[cycle] = np.roll(cycle, 1)
    device = next(vae.parameters()).device
    rng = torch.tensor([seed, 0], dtype=torch.int64, device=device)
    was_training, total = vae.training, 0.0
    vae.eval()
    with torch.no_grad():
        for start in range(0, count, _WINDOW_SEQUENCES):
            for numbers, batch in _cut(split, scores.number[start : start + _WINDOW_SEQUENCES], batch_sequences, 0, 1):
                rows = np.searchsorted(scores.number, numbers)
                z_BD = torch.from_numpy(scores.z[other[rows]]).to(device)
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    total += float(vae(batch.to(device), rng, z=z_BD).rec_KB[0].double().sum())
    vae.train(was_training)
    return total / count


def split_batches(
    split: Split, seed: int, batch_sequences: int, max_sequences: int | None, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """This rank's batches of the split, or of a random `max_sequences` of it."""
    total = min(split.sequences, max_sequences or split.sequences)
    for start in range(0, total, _WINDOW_SEQUENCES):
        index = np.arange(start, min(start + _WINDOW_SEQUENCES, total), dtype=np.int64)
        numbers = permute(index, split.sequences, mix(seed, 6)) if total < split.sequences else index
        yield from _cut(split, numbers, batch_sequences, rank, world_size)


def _cut(
    split: Split, numbers: np.ndarray, batch_sequences: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """This rank's batches of these sequences: (sequence numbers, padded batch), equally many on every rank.

    Sequences are sorted by length, so padding is small; ranks take turns, and a rank without a batch in the last
    round gets one padding sequence, because ZeRO-3 needs every rank in every forward.
    """
    sequences = gather(split, numbers, _BLOCK_SEQUENCES)
    by_length = np.argsort(sequences.lengths, kind="stable")
    cuts = [by_length[i : i + batch_sequences] for i in range(0, len(by_length), batch_sequences)]
    for turn in range(0, len(cuts), world_size):
        rows = cuts[turn + rank] if turn + rank < len(cuts) else by_length[:0]
        yield numbers[rows], collate(sequences.take(rows), numbers[rows])


def _score_batch(
    vae: TextVAE, numbers: np.ndarray, batch: Batch, seed: int, importance_samples: int, fitted_prior: bool
) -> Scores:
    """Scores of a batch's real sequences."""
    # Without a latent all samples are the same.
    wanted = max(1, importance_samples) if vae.latent_dim else 1
    drawn = draw_importance_samples(vae, batch, seed, wanted, stream=EVALUATION_STREAM, fitted_prior=fitted_prior)
    nothing_B = torch.full_like(drawn.rec_KB[0], math.nan)
    iw_B = drawn.log_likelihood() if importance_samples else nothing_B
    return _scores(vae, numbers, batch, drawn.first, drawn.rec_KB.mean(0), iw_B)


def _scores(
    vae: TextVAE, numbers: np.ndarray, batch: Batch, first: VaeOutput, rec_B: torch.Tensor, iw_B: torch.Tensor
) -> Scores:
    count, z = len(numbers), first.latent.z[0]
    rows, row_number = count, numbers
    if vae.per_token:
        rows, z = int(batch.offsets_B1[count]), z.flatten(0, 1)[batch.valid_N]
        row_number = np.repeat(numbers, batch.lengths_B[:count].cpu().numpy())

    def host(tensor: torch.Tensor, number: int, dtype: Any) -> np.ndarray:
        return tensor[:number].cpu().numpy().astype(dtype)

    posterior = vae.config.posterior
    return Scores(
        number=numbers,
        tokens=host(batch.lengths_B, count, np.int64),
        rec=host(rec_B, count, np.float64),
        kl=host(first.latent.kl.double(), count, np.float64),
        iw_log_likelihood=host(iw_B, count, np.float64),
        row_number=row_number,
        mean=host(first.mean_RD.float(), rows, np.float32),
        logvar=host(first.logvar_RD.float(), rows, np.float32),
        z=host(z.float(), rows, np.float32),
        has_dimensions=first.latent.kl_per_dim.numel() > 0,
        concentration=posterior.kappa if isinstance(posterior, VmfConfig) else None,
    )


def _gather(scores: Scores, rank: int, world_size: int) -> Scores | None:
    if world_size == 1:
        return scores
    parts: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(scores, parts, dst=0)
    return Scores.concatenate(parts) if parts is not None else None


def _exp(nats: float) -> float:
    """exp without an OverflowError: a model that diverged has an infinite perplexity."""
    return math.exp(nats) if nats < 700 else math.inf
