"""Torch backend of `gaussian_rsample_kl.py`. Shapes: K samples, B rows, D dimensions.

With e = exp(logvar), s = exp(logvar / 2), d = logvar - prior_logvar and m = mu - prior_mu:

    KL = (exp(d) - 1 - d + m^2 exp(-prior_logvar)) / 2      per row and dimension
    log q(z) = -(log 2 pi + logvar + eps^2) / 2             z = mu + s eps
    log p(z) = -(log 2 pi + prior_logvar + (z - prior_mu)^2 exp(-prior_logvar)) / 2
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from vae_kernels.philox import philox_normal

_LOG_2PI = math.log(2.0 * math.pi)

Upstream = tuple[torch.Tensor | None, ...]


class _Terms(NamedTuple):
    """Inputs in the arithmetic's dtype with padding rows zeroed, and what both passes need of them."""

    real_B1: torch.Tensor
    mu_BD: torch.Tensor
    logvar_BD: torch.Tensor
    sigma_BD: torch.Tensor
    prior_mu: torch.Tensor
    prior_logvar: torch.Tensor
    prior_precision: torch.Tensor
    kl_BD: torch.Tensor


def forward(
    mu_BD: torch.Tensor,
    logvar_BD: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    rng: torch.Tensor,
    sample_id_B: torch.Tensor,
    free_bits: torch.Tensor | None,
    num_samples: int,
    stream: int,
) -> tuple[torch.Tensor, ...]:
    """(z, kl, kl_free, kl_per_dim, log_q, log_p) of `GaussianSample`."""
    t = _terms(mu_BD, logvar_BD, prior_mu, prior_logvar, sample_id_B)
    free_bits = t.kl_BD.new_zeros(()) if free_bits is None else free_bits
    eps_KBD = _noise(t, rng, sample_id_B, num_samples, stream)
    z_KBD = (t.mu_BD + t.sigma_BD * eps_KBD).masked_fill(~t.real_B1, 0.0)
    log_q_KBD = -0.5 * (_LOG_2PI + t.logvar_BD + eps_KBD.square())
    log_p_KBD = -0.5 * (_LOG_2PI + t.prior_logvar + (z_KBD - t.prior_mu).square() * t.prior_precision)
    free_BD = torch.where(_above(t.kl_BD, free_bits), t.kl_BD, free_bits).masked_fill(~t.real_B1, 0.0)
    padding_B = ~t.real_B1[:, 0]
    return (
        z_KBD.to(mu_BD.dtype),
        t.kl_BD.sum(-1),
        free_BD.sum(-1),
        t.kl_BD.sum(0),
        log_q_KBD.sum(-1).masked_fill(padding_B, 0.0),
        log_p_KBD.sum(-1).masked_fill(padding_B, 0.0),
    )


def backward(
    mu_BD: torch.Tensor,
    logvar_BD: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    rng: torch.Tensor,
    sample_id_B: torch.Tensor,
    free_bits: torch.Tensor | None,
    num_samples: int,
    stream: int,
    upstream: Upstream,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (mu, logvar, prior_mu, prior_logvar), each [B, D] in the arithmetic's dtype, None where
    not needed.

    Args:
        upstream: gradients of (z, kl, kl_free, log_q, log_p); None where an output was not used.
    """
    grad_z, grad_kl, grad_kl_free, grad_log_q, grad_log_p = upstream
    t = _terms(mu_BD, logvar_BD, prior_mu, prior_logvar, sample_id_B)
    free_bits = t.kl_BD.new_zeros(()) if free_bits is None else free_bits
    grads = [torch.zeros_like(t.mu_BD) for _ in range(4)]
    if grad_kl is not None or grad_kl_free is not None:
        _add_kl(grads, t, _kl_upstream(t, free_bits, grad_kl, grad_kl_free))
    if grad_log_q is not None:
        # z moves with mu and logvar so that (z - mu) / sigma stays eps: only the normaliser's logvar is left.
        grads[1] -= 0.5 * grad_log_q.sum(0)[:, None]
    if grad_z is not None or grad_log_p is not None:
        eps_KBD = _noise(t, rng, sample_id_B, num_samples, stream)
        _add_sample(grads, t, eps_KBD, grad_z, grad_log_p)
    return tuple(
        grad.masked_fill(~t.real_B1, 0.0) if needed else None for grad, needed in zip(grads, needs, strict=True)
    )


def _terms(
    mu_BD: torch.Tensor,
    logvar_BD: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    sample_id_B: torch.Tensor,
) -> _Terms:
    dtype = torch.promote_types(mu_BD.dtype, torch.float32)
    real_B1 = (sample_id_B >= 0)[:, None]
    mu_BD = mu_BD.to(dtype).masked_fill(~real_B1, 0.0)
    logvar_BD = logvar_BD.to(dtype).masked_fill(~real_B1, 0.0)
    prior_mu, prior_logvar = (
        torch.zeros((), dtype=dtype, device=mu_BD.device)
        if prior is None
        else prior.to(dtype).expand_as(mu_BD).masked_fill(~real_B1, 0.0)
        for prior in (prior_mu, prior_logvar)
    )
    precision = torch.exp(-prior_logvar)
    d_BD = logvar_BD - prior_logvar
    # expm1 keeps the digits of a nearly collapsed dimension, where exp(d) - 1 would cancel.
    kl_BD = 0.5 * (torch.expm1(d_BD) - d_BD + (mu_BD - prior_mu).square() * precision)
    sigma_BD = torch.exp(0.5 * logvar_BD)
    return _Terms(real_B1, mu_BD, logvar_BD, sigma_BD, prior_mu, prior_logvar, precision, kl_BD)


def _noise(t: _Terms, rng: torch.Tensor, sample_id_B: torch.Tensor, num_samples: int, stream: int) -> torch.Tensor:
    dim = t.mu_BD.shape[1]
    return philox_normal(rng, sample_id_B, dim, num_samples=num_samples, stream=stream).to(t.mu_BD.dtype)


def _above(kl_BD: torch.Tensor, free_bits: torch.Tensor) -> torch.Tensor:
    # Without free bits nothing is flat, not even a KL that rounding made zero or slightly negative; nor is NaN.
    return ~(kl_BD <= free_bits) | (free_bits <= 0.0)


def _kl_upstream(
    t: _Terms, free_bits: torch.Tensor, grad_kl: torch.Tensor | None, grad_kl_free: torch.Tensor | None
) -> torch.Tensor:
    total_BD = torch.zeros_like(t.kl_BD)
    if grad_kl is not None:
        total_BD += grad_kl[:, None]
    if grad_kl_free is not None:
        total_BD += grad_kl_free[:, None] * _above(t.kl_BD, free_bits)
    return total_BD


def _add_kl(grads: list[torch.Tensor], t: _Terms, upstream_BD: torch.Tensor) -> None:
    m_BD = t.mu_BD - t.prior_mu
    d_mu_BD = upstream_BD * m_BD * t.prior_precision
    d_logvar_BD = 0.5 * upstream_BD * torch.expm1(t.logvar_BD - t.prior_logvar)
    grads[0] += d_mu_BD
    grads[1] += d_logvar_BD
    grads[2] -= d_mu_BD
    grads[3] -= d_logvar_BD + 0.5 * d_mu_BD * m_BD


def _add_sample(
    grads: list[torch.Tensor],
    t: _Terms,
    eps_KBD: torch.Tensor,
    grad_z: torch.Tensor | None,
    grad_log_p: torch.Tensor | None,
) -> None:
    path_KBD = torch.zeros_like(eps_KBD) if grad_z is None else grad_z.to(eps_KBD.dtype)
    if grad_log_p is not None:
        offset_KBD = t.mu_BD + t.sigma_BD * eps_KBD - t.prior_mu
        pull_KBD = grad_log_p[:, :, None] * offset_KBD * t.prior_precision
        path_KBD = path_KBD - pull_KBD
        grads[2] += pull_KBD.sum(0)
        grads[3] += 0.5 * (pull_KBD * offset_KBD - grad_log_p[:, :, None]).sum(0)
    grads[0] += path_KBD.sum(0)
    grads[1] += 0.5 * t.sigma_BD * (path_KBD * eps_KBD).sum(0)
