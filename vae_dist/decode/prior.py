"""Latents to sample from. Shapes: B rows, D latent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vae_dist.errors import DataError
from vae_dist.model.vae import TextVAE
from vae_kernels import philox_normal, philox_uniform

PRIOR_STREAM = 3
COMPONENT_STREAM = 5
_KEY = torch.zeros(2, dtype=torch.int64)


def prior_names(vae: TextVAE) -> list[str]:
    """What z can be drawn from, the usual one first: "fitted", the mixture fitted to the latents; the trained prior."""
    return [*(["fitted"] if vae.sampling_prior else []), vae.trained_prior_name]


@torch.inference_mode()
def prior_latents(
    vae: TextVAE, seeds: Sequence[int], max_tokens: int, scale: float = 1.0, prior: str | None = None
) -> torch.Tensor:
    """z ~ p(z) for each seed, float32 [B, D], or [B, max_tokens, D] where every token has a latent.

    Row i depends on seeds[i] alone. `scale` multiplies the noise that z is made of; `prior` is one of `prior_names`,
    by default the first.

    Raises:
        DataError: a scale other than 1 where z lies on the sphere, or a prior that the model does not have.
    """
    names = prior_names(vae)
    if prior not in (None, *names):
        raise DataError(f"This model has no prior {prior!a}; it has: {', '.join(names)}.")
    sampler = vae.sampling_prior if (prior or names[0]) == "fitted" else vae.prior
    device = vae.output_bias.device
    if sampler is None:
        return torch.zeros(len(seeds), 0, device=device)
    if scale != 1.0 and vae.config.posterior.kind == "vmf":
        raise DataError(
            f"A prior scale of {scale:g} would take z off the sphere that this model's latents lie on. Leave it at 1."
        )
    rows = max_tokens if vae.per_token else 1
    seed_B = torch.tensor(list(seeds), dtype=torch.int64)
    # The latents of a row's tokens are so many dimensions of one draw.
    normal = scale * philox_normal(_KEY, seed_B, rows * vae.latent_dim, num_samples=1, stream=PRIOR_STREAM)[0]
    uniform = philox_uniform(_KEY, seed_B[:, None], torch.arange(rows), stream=COMPONENT_STREAM)
    noise = normal.view(-1, vae.latent_dim).to(device), uniform.flatten().to(device)
    z = sampler.from_noise(*noise, vae.encode_embeddings)
    return z.unflatten(0, (len(seeds), max_tokens)) if vae.per_token else z
