"""The aggregate posterior: latents of a split over all ranks, and the mixture of Gaussians fitted to them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vae_dist.data.store.split import Split
from vae_dist.evaluate.likelihood import split_batches
from vae_dist.evaluate.mixture_em import compare_fit, fit_mixture
from vae_dist.model.vae import TextVAE

AGGREGATE_STREAM = 6
_BATCH_SEQUENCES = 256
# More latents do not change a mixture of some tens of Gaussians.
_FITTED_SEQUENCES = 200_000
# One in so many is held out of the fit, to judge it by.
_HELD_OUT = 10


class AggregateLatents(NamedTuple):
    """One z ~ q(z | x) for each of this rank's sequences, float32 [n, D], and the sequences' numbers."""

    z_nD: torch.Tensor
    number_n: torch.Tensor


def fit_sampling_prior(
    vae: TextVAE, split: Split, *, seed: int, autocast: torch.dtype | None, rank: int, world_size: int
) -> dict[str, float]:
    """Fit `vae.sampling_prior` to latents of the split (at most 200,000) by EM. Collective.

    Returns:
        mean log density in nats of held-out latents under the mixture, one Gaussian and N(0, I), and the counts.
    """
    assert vae.sampling_prior is not None
    z_nD, number_n = aggregate_latents(
        vae, split, seed=seed, autocast=autocast, rank=rank, world_size=world_size, max_sequences=_FITTED_SEQUENCES
    )
    held_out_n = number_n % _HELD_OUT == 0
    fit = fit_mixture(z_nD[~held_out_n], number_n[~held_out_n], vae.config.sampling_components, seed=seed)
    vae.sampling_prior.store(fit.mixture)
    return {**compare_fit(fit, z_nD[held_out_n]), "rows": fit.rows, "iterations": len(fit.log_likelihood) - 1}


@torch.no_grad()
def aggregate_latents(
    vae: TextVAE,
    split: Split,
    *,
    seed: int,
    autocast: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
    max_sequences: int | None = None,
) -> AggregateLatents:
    """A sample of the posterior of each sequence of the split, or of a random `max_sequences` of it."""
    assert vae.posterior is not None
    device = vae.output_bias.device
    rng = torch.tensor([seed, 0], dtype=torch.int64, device=device)
    was_training, z, numbers = vae.training, [], []
    vae.eval()
    for number, batch in split_batches(split, seed, _BATCH_SEQUENCES, max_sequences, rank, world_size):
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            mean_BD, logvar_BD = vae.encode(batch.to(device))
        sample = vae.posterior.draw(
            mean_BD,
            logvar_BD,
            rng,
            batch.sample_id_B.to(device),
            num_samples=1,
            free_bits=0.0,
            stream=AGGREGATE_STREAM,
            backend=vae.kernels,
            prior=None,
        )
        z.append(sample.z[0, : len(number)].float())
        numbers.append(torch.from_numpy(number).to(device))
    vae.train(was_training)
    return AggregateLatents(torch.cat(z), torch.cat(numbers))
