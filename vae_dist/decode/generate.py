"""Batched decoding: latents to token sequences, one decoder step for all rows at a time. Pure torch.

Shapes: B rows, D latent, V vocabulary.

Every random number is a counter-based function of (row's seed, position), so a row's text does not depend
on which other rows share its batch (up to rounding of the logits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vae_dist.data.text.special_ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from vae_dist.errors import DataError
from vae_dist.model.vae import TextVAE
from vae_kernels import gaussian_rsample_kl, philox_uniform

PRIOR_STREAM = 3
TOKEN_STREAM = 4
COMPONENT_STREAM = 5
# Dividing logits by less would overflow float32; the likeliest token has all the mass there anyway.
_GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class Decoding:
    """How a token is chosen from the decoder's distribution.

    Attributes:
        temperature: 0 (or below 1e-6) is greedy; 1 is the model's own distribution.
        top_k: keep the k likeliest tokens; 0 is off.
        top_p: keep the smallest set of likeliest tokens whose mass reaches p, at least one; 1 is off. The mass is
            taken before top_k.
        max_tokens: stop after so many tokens, end of sequence included.
        allow_unknown: let the model write <unk>; by default its mass goes to the other tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 64
    allow_unknown: bool = False


@dataclass(frozen=True)
class Generated:
    """One decoded row.

    Attributes:
        tokens: ids, the end-of-sequence token included when it was reached.
        log_prob: sum of the log-probabilities (nats) under the model's own distribution.
        finished: whether the end of sequence was reached within `max_tokens`.
    """

    tokens: list[int]
    log_prob: float
    finished: bool


@torch.inference_mode()
def prior_latents(vae: TextVAE, seeds: Sequence[int], max_tokens: int, scale: float = 1.0) -> torch.Tensor:
    """z ~ p(z) for each seed, float32 [B, D], or [B, max_tokens, D] where every token has a latent.

    From the mixture that was fitted to the latents where there is one, else from the prior. Row i depends on seeds[i]
    alone. `scale` multiplies the noise that z is made of.

    Raises:
        DataError: a scale other than 1 where z lies on the sphere.
    """
    sampler, device = vae.sampling_prior or vae.prior, vae.output_bias.device
    if sampler is None:
        return torch.zeros(len(seeds), 0, device=device)
    if scale != 1.0 and vae.config.posterior.kind == "vmf":
        raise DataError(
            f"A prior scale of {scale:g} would take z off the sphere that this model's latents lie on. Leave it at 1."
        )
    rows = max_tokens if vae.per_token else 1
    seed_B = torch.tensor(list(seeds), dtype=torch.int64)
    # The latents of a row's tokens are so many dimensions of one draw.
    zeros = torch.zeros(len(seed_B), rows * vae.latent_dim)
    normal = scale * gaussian_rsample_kl(zeros, zeros, _KEY, seed_B, stream=PRIOR_STREAM, backend="torch").z[0]
    uniform = philox_uniform(_KEY, seed_B[:, None], torch.arange(rows), stream=COMPONENT_STREAM)
    noise = normal.view(-1, vae.latent_dim).to(device), uniform.flatten().to(device)
    z = sampler.from_noise(*noise, vae.encode_embeddings)
    return z.unflatten(0, (len(seeds), max_tokens)) if vae.per_token else z


@torch.inference_mode()
def generate(
    vae: TextVAE,
    z: torch.Tensor,
    seeds: Sequence[int],
    decoding: Decoding,
    lengths: Sequence[int] | None = None,
) -> list[Generated]:
    """Decode latents to tokens.

    Args:
        vae: in eval mode.
        z: float32 latents [B, D], or [B, T, D] with one for each token, of which there are then at most T.
        seeds: one per row; not used when greedy.
        decoding: how tokens are chosen.
        lengths: most tokens of each row, where every token has a latent and rows have more or fewer of them.
    """
    device, count = z.device, z.shape[0]
    most = min(decoding.max_tokens, z.shape[1]) if z.dim() == 3 else decoding.max_tokens
    limit_B = torch.full((count,), most, device=device) if lengths is None else torch.tensor(lengths, device=device)
    seed_B = torch.tensor(list(seeds), dtype=torch.int64, device=device)
    banned = [PAD_ID, BOS_ID] + ([] if decoding.allow_unknown else [UNK_ID])
    token_B = torch.full((count,), BOS_ID, dtype=torch.int64, device=device)
    state: Any = vae.decoder.start(z if z.dim() == 2 else z[:, 0], decoding.max_tokens)
    log_prob_B = torch.zeros(count, device=device)
    done_B = torch.zeros(count, dtype=torch.bool, device=device)
    finished_B = done_B
    columns = []
    for position in range(most):
        logits_BV, state = vae.step(token_B, z if z.dim() == 2 else z[:, position], state, position)
        log_prob_BV = torch.log_softmax(logits_BV, dim=-1)
        chosen_B = _choose(
            logits_BV.index_fill(1, torch.tensor(banned, device=device), -torch.inf), seed_B, position, decoding
        )
        token_B = torch.where(done_B, PAD_ID, chosen_B)
        log_prob_B += torch.where(done_B, 0.0, log_prob_BV.gather(1, chosen_B[:, None])[:, 0])
        columns.append(token_B)
        finished_B = finished_B | (token_B == EOS_ID)
        done_B = finished_B | (position + 1 >= limit_B)
        if bool(done_B.all()):
            break
    rows = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in range(count)]
    return [
        Generated([t for t in row if t != PAD_ID], log_prob, done)
        for row, log_prob, done in zip(rows, log_prob_B.tolist(), finished_B.tolist(), strict=True)
    ]


def _choose(logits_BV: torch.Tensor, seed_B: torch.Tensor, position: int, decoding: Decoding) -> torch.Tensor:
    """One token id per row: the likeliest, or the inverse CDF at the row's uniform number."""
    if decoding.temperature < _GREEDY_BELOW:
        return logits_BV.argmax(dim=-1)
    sorted_BV, id_BV = torch.sort(logits_BV / decoding.temperature, dim=-1, descending=True, stable=True)
    prob_BV = torch.softmax(sorted_BV, dim=-1)
    if decoding.top_k:
        prob_BV[:, decoding.top_k :] = 0.0
    if decoding.top_p < 1.0:
        # A token stays while the mass before it is below p; the likeliest stays for any p.
        prob_BV[:, 1:][(prob_BV.cumsum(-1) - prob_BV)[:, 1:] >= decoding.top_p] = 0.0
    cumulative_BV = prob_BV.double().cumsum(-1)
    key = _KEY.to(logits_BV.device)
    uniform_B = philox_uniform(key, seed_B, torch.tensor(position, device=seed_B.device), stream=TOKEN_STREAM)
    threshold_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
    rank_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
    last_B = (prob_BV > 0).sum(-1) - 1
    return id_BV.gather(1, torch.minimum(rank_B, last_B)[:, None])[:, 0]


_KEY = torch.zeros(2, dtype=torch.int64)
