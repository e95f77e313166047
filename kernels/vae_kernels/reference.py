"""Plain references of the operations, for tests: all is materialised and left to autograd.

Shapes: N rows, H hidden, V vocabulary, B sequences, K samples, D latent dimensions. Use float64 inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch


def linear_cross_entropy(
    x_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_N: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """nll [N] by the definition in `linear_cross_entropy.py`, all logits at once."""
    logits_NV = x_NH @ weight_VH.t()
    if bias is not None:
        logits_NV = logits_NV + bias
    logits_NV = logits_NV * logit_scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    log_p_NV = torch.log_softmax(logits_NV, dim=-1)
    ignored_N = target_N == ignore_index
    chosen_N = log_p_NV.gather(1, target_N.masked_fill(ignored_N, 0)[:, None])[:, 0]
    nll_N = -(1.0 - label_smoothing) * chosen_N - label_smoothing * log_p_NV.mean(-1)
    nll_N = nll_N + z_loss * torch.logsumexp(logits_NV, dim=-1).square()
    return torch.where(ignored_N, 0.0, nll_N)


def gaussian_rsample_kl(
    mu_BD: torch.Tensor,
    logvar_BD: torch.Tensor,
    eps_KBD: torch.Tensor,
    sample_id_B: torch.Tensor,
    *,
    free_bits: float = 0.0,
    prior_mu: torch.Tensor | None = None,
    prior_logvar: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """(z, kl, kl_free, kl_per_dim, log_q, log_p) of `GaussianSample` for given noise."""
    real_B = (sample_id_B >= 0).to(mu_BD.dtype)
    prior_mu = torch.zeros_like(mu_BD) if prior_mu is None else prior_mu.expand_as(mu_BD)
    prior_logvar = torch.zeros_like(mu_BD) if prior_logvar is None else prior_logvar.expand_as(mu_BD)
    z_KBD = mu_BD + torch.exp(logvar_BD / 2) * eps_KBD
    ratio_BD = (torch.exp(logvar_BD) + (mu_BD - prior_mu) ** 2) / torch.exp(prior_logvar)
    kl_BD = 0.5 * (prior_logvar - logvar_BD + ratio_BD - 1.0)
    free_BD = kl_BD.clamp(min=free_bits) if free_bits > 0 else kl_BD
    log_q_KB = _log_density(z_KBD, mu_BD, logvar_BD)
    log_p_KB = _log_density(z_KBD, prior_mu, prior_logvar)
    return (
        z_KBD * real_B[:, None],
        kl_BD.sum(-1) * real_B,
        free_BD.sum(-1) * real_B,
        (kl_BD * real_B[:, None]).sum(0),
        log_q_KB * real_B,
        log_p_KB * real_B,
    )


def segment_sum(x_N: torch.Tensor, cu_seqlens_B1: torch.Tensor) -> torch.Tensor:
    """Sum of each sequence's rows, [B]."""
    offsets = cu_seqlens_B1.tolist()
    return torch.stack([x_N[a:b].sum() for a, b in itertools.pairwise(offsets)])


def embedding_word_dropout(
    tokens_BT: torch.Tensor,
    weight_VE: torch.Tensor,
    uniform_BT: torch.Tensor,
    *,
    rate: float,
    unk_id: int,
    keep_ids: Sequence[int] = (),
) -> torch.Tensor:
    """[B, T, E] for given noise, as a product with one-hot vectors: T positions, E embedding."""
    kept_BT = torch.isin(tokens_BT, torch.tensor(keep_ids, dtype=tokens_BT.dtype))
    words_BT = torch.where((uniform_BT < rate) & ~kept_BT, unk_id, tokens_BT)
    return torch.nn.functional.one_hot(words_BT, weight_VE.shape[0]).to(weight_VE.dtype) @ weight_VE


def _log_density(z: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    terms = math.log(2.0 * math.pi) + logvar + (z - mean) ** 2 / torch.exp(logvar)
    return -0.5 * terms.sum(-1)
