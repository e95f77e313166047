"""Reparameterised sample of a diagonal Gaussian posterior and its KL to a Gaussian prior, noise regenerated.

Shapes: B sequences, D latent dimensions, K samples.

    z = mu + sigma * eps,  sigma = exp(logvar / 2)                                 (Kingma and Welling 2014)
    KL_d = ( prior_logvar - logvar + (exp(logvar) + (mu - prior_mu)^2) / exp(prior_logvar) - 1 ) / 2
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from vae_kernels.backend import resolve_backend
from vae_kernels.philox import philox_normal

LOG_2PI = math.log(2.0 * math.pi)


class GaussianSample(NamedTuple):
    """What `gaussian_rsample_kl` returns. Padding rows (sample_id < 0) are zero everywhere.

    Attributes:
        z: [K, B, D] in the dtype of mu.
        kl: float32 [B], KL(q || p) summed over dimensions, nats.
        kl_free: float32 [B], sum over dimensions of max(free_bits, KL_d); its gradient is 0 where the floor holds.
        kl_per_dim: float32 [D], sum over real rows of KL_d; not differentiable.
        log_q, log_p: float32 [K, B], log-densities of z under posterior and prior, nats.
    """

    z: torch.Tensor
    kl: torch.Tensor
    kl_free: torch.Tensor
    kl_per_dim: torch.Tensor
    log_q: torch.Tensor
    log_p: torch.Tensor


def gaussian_rsample_kl(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    rng: torch.Tensor,
    sample_id: torch.Tensor,
    *,
    num_samples: int = 1,
    stream: int = 0,
    free_bits: float | torch.Tensor = 0.0,
    prior_mu: torch.Tensor | None = None,
    prior_logvar: torch.Tensor | None = None,
    backend: str = "auto",
) -> GaussianSample:
    """Draw z, and give its KL and densities, in one pass.

    Args:
        mu, logvar: [B, D], the posterior.
        rng: int64[2] on the same device, (seed, step).
        sample_id: int64[B], names each row's noise; negative marks padding.
        num_samples: K, below 2^24.
        stream: tag below 128 that keeps uses of one (seed, step, sample_id) apart.
        free_bits: nats per dimension and row, at least 0.
        prior_mu, prior_logvar: [D] or [B, D]; default standard normal.
        backend: auto, triton or torch.

    Gradients flow through z, kl, kl_free, log_q and log_p to mu, logvar and the prior's parameters; log_q keeps
    both its path through z and its score term. All arithmetic is float32 (float64 for float64 inputs).
    """
    if mu.shape != logvar.shape or mu.ndim != 2:
        raise ValueError(f"mu and logvar must both be [B, D], not {tuple(mu.shape)} and {tuple(logvar.shape)}")
    chosen = resolve_backend(backend, mu)
    free = torch.as_tensor(free_bits, dtype=torch.float32, device=mu.device)
    p_mu = mu.new_zeros(mu.shape[1]) if prior_mu is None else prior_mu
    p_logvar = mu.new_zeros(mu.shape[1]) if prior_logvar is None else prior_logvar
    arguments = (mu, logvar, p_mu.expand_as(mu), p_logvar.expand_as(mu), rng, sample_id, free, num_samples, stream)
    return GaussianSample(*_GaussianRsampleKl.apply(*arguments, chosen))


class _GaussianRsampleKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        mu, logvar, p_mu, p_logvar, rng, sample_id, free, num_samples, stream, backend = arguments
        ctx.save_for_backward(mu, logvar, p_mu, p_logvar, rng, sample_id, free)
        ctx.options = (num_samples, stream, backend)
        if backend == "triton":
            from vae_kernels.gaussian_rsample_kl_triton import forward

            outputs = forward(*arguments[:-1])
        else:
            outputs = _forward(*arguments[:-1])
        ctx.mark_non_differentiable(outputs[3])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        num_samples, stream, backend = ctx.options
        g_z, g_kl, g_free, _, g_q, g_p = upstream
        if backend == "triton":
            from vae_kernels.gaussian_rsample_kl_triton import backward
        else:
            backward = _backward
        grads = backward(*ctx.saved_tensors, num_samples, stream, g_z, g_kl, g_free, g_q, g_p)
        return (*grads, None, None, None, None, None, None)


def _compute_dtype(mu: torch.Tensor) -> torch.dtype:
    return torch.float64 if mu.dtype == torch.float64 else torch.float32


def _forward(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    p_mu: torch.Tensor,
    p_logvar: torch.Tensor,
    rng: torch.Tensor,
    sample_id: torch.Tensor,
    free: torch.Tensor,
    num_samples: int,
    stream: int,
) -> tuple[torch.Tensor, ...]:
    dtype, real_B1 = _compute_dtype(mu), (sample_id >= 0)[:, None]
    m, v, pm, pv = (t.to(dtype) for t in (mu, logvar, p_mu, p_logvar))
    eps = philox_normal(rng, sample_id, mu.shape[1], num_samples=num_samples, stream=stream).to(dtype)
    z = torch.where(real_B1, m + torch.exp(0.5 * v) * eps, 0.0)
    kl_BD = 0.5 * (pv - v + (v.exp() + (m - pm) ** 2) * torch.exp(-pv) - 1.0)
    kl_BD = torch.where(real_B1, kl_BD, 0.0)
    kl_free_BD = torch.where(real_B1, torch.maximum(kl_BD, free.to(dtype)), 0.0)
    log_q = torch.where(real_B1, -0.5 * (LOG_2PI + v + eps**2), 0.0).sum(-1)
    log_p = torch.where(real_B1, -0.5 * (LOG_2PI + pv + (z - pm) ** 2 * torch.exp(-pv)), 0.0).sum(-1)
    return z.to(mu.dtype), kl_BD.sum(-1), kl_free_BD.sum(-1), kl_BD.sum(0), log_q, log_p


def _backward(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    p_mu: torch.Tensor,
    p_logvar: torch.Tensor,
    rng: torch.Tensor,
    sample_id: torch.Tensor,
    free: torch.Tensor,
    num_samples: int,
    stream: int,
    g_z: torch.Tensor,
    g_kl: torch.Tensor,
    g_free: torch.Tensor,
    g_q: torch.Tensor,
    g_p: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Chain rule written out: z = m + s * eps, log_q = -sum(v + eps^2) / 2 as a function of v alone."""
    dtype, real_B1 = _compute_dtype(mu), (sample_id >= 0)[:, None]
    m, v, pm, pv = (t.to(dtype) for t in (mu, logvar, p_mu, p_logvar))
    eps = philox_normal(rng, sample_id, mu.shape[1], num_samples=num_samples, stream=stream).to(dtype)
    sigma, precision = torch.exp(0.5 * v), torch.exp(-pv)
    distance = m + sigma * eps - pm
    kl_BD = 0.5 * (pv - v + (v.exp() + (m - pm) ** 2) * precision - 1.0)
    g_kl_BD = g_kl.to(dtype)[:, None] + torch.where(kl_BD > free.to(dtype), g_free.to(dtype)[:, None], 0.0)
    g_p_KB1 = g_p.to(dtype)[..., None]
    g_z_total = g_z.to(dtype) - g_p_KB1 * distance * precision
    d_mu = g_z_total.sum(0) + g_kl_BD * (m - pm) * precision
    d_logvar = (g_z_total * eps).sum(0) * 0.5 * sigma - 0.5 * g_q.to(dtype).sum(0)[:, None]
    d_logvar = d_logvar + 0.5 * g_kl_BD * (torch.exp(v - pv) - 1.0)
    d_p_mu = (g_p_KB1 * distance).sum(0) * precision - g_kl_BD * (m - pm) * precision
    d_p_logvar = 0.5 * (g_p_KB1 * (distance**2 * precision - 1.0)).sum(0)
    d_p_logvar = d_p_logvar + 0.5 * g_kl_BD * (1.0 - (v.exp() + (m - pm) ** 2) * precision)
    grads = (d_mu, d_logvar, d_p_mu, d_p_logvar)
    inputs = (mu, logvar, p_mu, p_logvar)
    return tuple(torch.where(real_B1, g, 0.0).to(t.dtype) for g, t in zip(grads, inputs, strict=True))
