"""Importance samples of a batch, drawn a few at a time so that memory does not grow with their number.

Shapes: B sequences, K samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from vae_dist.data.stream.batch import Batch
from vae_dist.model.vae import TextVAE, VaeOutput

_SAMPLES_AT_ONCE = 10


class ImportanceSamples(NamedTuple):
    """What K samples of each sequence say.

    Attributes:
        first: the model's output for the first few of them; its posterior and KL are those of all.
        rec_KB: float64, -log p(x | z_k) in nats.
        log_ratio_KB: float64, log p(z_k) - log q(z_k | x) in nats.
    """

    first: VaeOutput
    rec_KB: torch.Tensor
    log_ratio_KB: torch.Tensor

    def log_likelihood(self) -> torch.Tensor:
        """The importance-weighted bound of log p(x), float64 [B] (Burda et al. 2016)."""
        return torch.logsumexp(self.log_ratio_KB - self.rec_KB, dim=0) - math.log(len(self.rec_KB))


def draw_importance_samples(
    vae: TextVAE, batch: Batch, seed: int, samples: int, *, stream: int, fitted_prior: bool = False
) -> ImportanceSamples:
    """Encode the batch once and decode `samples` latents of each sequence; noise is named by (seed, chunk, stream)."""
    outputs: list[VaeOutput] = []
    for chunk, begin in enumerate(range(0, samples, _SAMPLES_AT_ONCE)):
        # Chunks are of one size and named by the key's second number, so no sample depends on the batch.
        rng = torch.tensor([seed, chunk], dtype=torch.int64, device=batch.tokens_BT.device)
        output = vae(
            batch,
            rng,
            num_samples=min(_SAMPLES_AT_ONCE, samples - begin),
            stream=stream,
            fitted_prior=fitted_prior,
            posterior_rows=(outputs[0].mean_RD, outputs[0].logvar_RD) if outputs else None,
        )
        keep = output.latent if not outputs else output.latent._replace(z=output.latent.z[:0])
        outputs.append(output._replace(latent=keep))
    return ImportanceSamples(
        first=outputs[0],
        rec_KB=torch.cat([o.rec_KB for o in outputs]).double(),
        log_ratio_KB=torch.cat([o.latent.log_p - o.latent.log_q for o in outputs]).double(),
    )
