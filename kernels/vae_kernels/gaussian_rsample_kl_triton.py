"""Triton backend of `gaussian_rsample_kl.py`: one launch forward, one backward.

The formulas are in `gaussian_rsample_kl_torch.py`.

A program owns a block of R rows and all dimensions. The KL per dimension is a sum over rows: while the whole operation
is a matter of launches, programs of their own form it, reading mu and logvar once more; of many rows each block leaves
its part for a second step. Gradients of a shared prior take a second step, too. All in a fixed order, never by atomics.
Shapes: K samples, B rows, D dimensions, P = padded number of dimension pairs, R rows of a program.
"""

# Triton reads a kernel's annotations as its own, so kernels carry none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vae_kernels.philox_triton import normal_pair, philox_uniform_pair

_MAX_DIM = 4096
_ELEMENTS_PER_PROGRAM = 1024
NUM_WARPS = 4
# Up to so many rows, programs of their own sum the KL per dimension, DIM_TILE dimensions each.
ROWS_OF_ONE_LAUNCH = 4096
DIM_TILE = {"SUM_ROWS": 128, "SUM_DIMS": 16}


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
    B, D = mu_BD.shape
    rows, pairs = block_shape(D)
    blocks, one_launch = triton.cdiv(B, rows), B <= ROWS_OF_ONE_LAUNCH
    kl_B, kl_free_B = (mu_BD.new_empty(B, dtype=torch.float32) for _ in range(2))
    log_q_KB, log_p_KB = (mu_BD.new_empty(num_samples, B, dtype=torch.float32) for _ in range(2))
    z_KBD = mu_BD.new_empty(num_samples, B, D)
    per_dim_GD = mu_BD.new_empty(1 if one_launch else blocks, D, dtype=torch.float32)
    sums = triton.cdiv(D, DIM_TILE["SUM_DIMS"]) if one_launch else 0
    gaussian_forward_kernel[(blocks + sums,)](
        *_parameters(mu_BD, logvar_BD, prior_mu, prior_logvar),
        rng.contiguous(), sample_id_B.contiguous(), rng if free_bits is None else free_bits,
        z_KBD, kl_B, kl_free_B, per_dim_GD, log_q_KB, log_p_KB,
        B, D, num_samples, blocks,
        STREAM=stream, HAS_PRIOR_MU=prior_mu is not None, HAS_PRIOR_LOGVAR=prior_logvar is not None,
        HAS_FREE_BITS=free_bits is not None, ONE_LAUNCH=one_launch, **DIM_TILE, R=rows, P=pairs, num_warps=warps(pairs),
    )  # fmt: skip
    return z_KBD, kl_B, kl_free_B, per_dim_GD[0] if one_launch else per_dim_GD.sum(0), log_q_KB, log_p_KB


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
    upstream: tuple[torch.Tensor | None, ...],
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (mu, logvar, prior_mu, prior_logvar), [B, D], None where not needed; the first two in mu's dtype."""
    B, D = mu_BD.shape
    rows, pairs = block_shape(D)
    need_prior = needs[2] or needs[3]
    own = [torch.empty_like(mu_BD, memory_format=torch.contiguous_format) for _ in range(2)]
    prior = [mu_BD.new_empty(B, D, dtype=torch.float32) for _ in range(2)] if need_prior else own
    # An absent tensor is passed as any valid pointer; its constexpr flag keeps the kernel from reading it.
    upstream_pointers = [mu_BD if grad is None else grad.contiguous() for grad in upstream]
    has = {f"HAS_{name}": grad is not None for name, grad in zip(_UPSTREAM, upstream, strict=True)}
    if B:
        gaussian_backward_kernel[(triton.cdiv(B, rows),)](
            *_parameters(mu_BD, logvar_BD, prior_mu, prior_logvar),
            rng.contiguous(), sample_id_B.contiguous(), rng if free_bits is None else free_bits,
            *upstream_pointers, *own, *prior,
            B, D, num_samples,
            STREAM=stream, HAS_PRIOR_MU=prior_mu is not None, HAS_PRIOR_LOGVAR=prior_logvar is not None,
            HAS_FREE_BITS=free_bits is not None, **has, NEED_PRIOR=need_prior,
            R=rows, P=pairs, num_warps=warps(pairs),
        )  # fmt: skip
    return tuple(grad if needed else None for grad, needed in zip((*own, *prior), needs, strict=True))


_UPSTREAM = ("GRAD_Z", "GRAD_KL", "GRAD_KL_FREE", "GRAD_LOG_Q", "GRAD_LOG_P")


def block_shape(dim: int) -> tuple[int, int]:
    """(rows of a program, dimension pairs padded to a power of two).

    Raises:
        ValueError: more dimensions than a program can hold.
    """
    if not 1 <= dim <= _MAX_DIM:
        raise ValueError(f"the Triton kernels take 1 to {_MAX_DIM} latent dimensions, got {dim}; use backend='torch'")
    pairs = triton.next_power_of_2((dim + 1) // 2)
    return max(1, _ELEMENTS_PER_PROGRAM // (2 * pairs)), pairs


def warps(pairs: int) -> int:
    """More for the widest rows, whose dimensions would not fit into the registers of fewer."""
    return max(NUM_WARPS, pairs // 128)


def _parameters(
    mu_BD: torch.Tensor, logvar_BD: torch.Tensor, prior_mu: torch.Tensor | None, prior_logvar: torch.Tensor | None
) -> tuple[Any, ...]:
    """Four pointers and their row strides; the stride of a prior shared by all rows is zero.

    Rows may lie apart, as halves of one linear layer's result do: they are not copied.
    """
    tensors = [mu_BD, logvar_BD, *(mu_BD if prior is None else prior for prior in (prior_mu, prior_logvar))]
    tensors = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]
    return (*tensors, *(0 if tensor.dim() == 1 else tensor.stride(0) for tensor in tensors))


@triton.jit
def _load_terms(
    mu, logvar, prior_mu, prior_logvar, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, row, dim, live,
    HAS_PRIOR_MU: tl.constexpr, HAS_PRIOR_LOGVAR: tl.constexpr,
):  # fmt: skip
    """float32 [R, 2P]: mu, logvar, prior mean, prior log-variance; zero where `live` is false."""
    mu_RD = tl.load(mu + row[:, None] * mu_stride + dim[None, :], mask=live, other=0.0).to(tl.float32)
    logvar_RD = tl.load(logvar + row[:, None] * logvar_stride + dim[None, :], mask=live, other=0.0).to(tl.float32)
    prior_mu_RD = tl.zeros_like(mu_RD)
    prior_logvar_RD = tl.zeros_like(mu_RD)
    if HAS_PRIOR_MU:
        at = row[:, None] * prior_mu_stride + dim[None, :]
        prior_mu_RD = tl.load(prior_mu + at, mask=live, other=0.0).to(tl.float32)
    if HAS_PRIOR_LOGVAR:
        at = row[:, None] * prior_logvar_stride + dim[None, :]
        prior_logvar_RD = tl.load(prior_logvar + at, mask=live, other=0.0).to(tl.float32)
    return mu_RD, logvar_RD, prior_mu_RD, prior_logvar_RD


@triton.jit
def _exp_minus_1_minus(d):
    """exp(d) - 1 - d, by its series near zero, where the direct form would cancel."""
    series = 1.0 / 24 + d * (1.0 / 120 + d * (1.0 / 720 + d * (1.0 / 5040 + d * (1.0 / 40320))))
    series = d * d * (0.5 + d * (1.0 / 6 + d * series))
    return tl.where(tl.abs(d) < 0.25, series, tl.exp(d) - 1.0 - d)


@triton.jit
def _floor(free_bits, HAS_FREE_BITS: tl.constexpr):
    """KL below which kl_free is flat: without free bits nothing is, not even a KL that rounding made zero."""
    threshold = tl.full((), 0.0, tl.float32)
    if HAS_FREE_BITS:
        threshold = tl.load(free_bits).to(tl.float32)
    return tl.where(threshold > 0.0, threshold, float("-inf"))


@triton.jit
def _noise(rng, sample_id, k, STREAM: tl.constexpr, P: tl.constexpr):
    """float32 [R, 2P]: the row's normals of sample k."""
    pair = tl.arange(0, P)[None, :]
    tag = tl.full((1, P), STREAM << 24, tl.uint32) + k
    radius, angle = philox_uniform_pair(rng, sample_id[:, None], pair, tag)
    even, odd = normal_pair(radius, angle)
    return tl.interleave(even, odd)


@triton.jit
def gaussian_forward_kernel(
    mu, logvar, prior_mu, prior_logvar, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride,
    rng, sample_id, free_bits, z, kl, kl_free, per_dim, log_q, log_p,
    B, D, K, blocks,
    STREAM: tl.constexpr, HAS_PRIOR_MU: tl.constexpr, HAS_PRIOR_LOGVAR: tl.constexpr, HAS_FREE_BITS: tl.constexpr,
    ONE_LAUNCH: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_DIMS: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Programs below `blocks`: all outputs of `GaussianSample` for a block of rows, but the KL per dimension.

    With ONE_LAUNCH the programs beyond sum that over all rows, [D]; else each block writes its part, [blocks, D].
    """
    block = tl.program_id(0).to(tl.int64)
    if block < blocks:
        row = block * R + tl.arange(0, R)
        dim = tl.arange(0, 2 * P)
        inside = row < B
        within = inside[:, None] & (dim < D)[None, :]
        offset = row[:, None] * D + dim[None, :]
        id_R = tl.load(sample_id + row, mask=inside, other=-1)
        live = within & (id_R >= 0)[:, None]
        m, lv, pm, plv = _load_terms(
            mu, logvar, prior_mu, prior_logvar, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride,
            row, dim, live, HAS_PRIOR_MU, HAS_PRIOR_LOGVAR,
        )  # fmt: skip
        precision = tl.exp(-plv)
        sigma = tl.exp(0.5 * lv)
        kl_RD = 0.5 * (_exp_minus_1_minus(lv - plv) + (m - pm) * (m - pm) * precision)
        # Written so that NaN stays.
        floor = _floor(free_bits, HAS_FREE_BITS)
        free_RD = tl.where(kl_RD <= floor, floor, kl_RD)
        tl.store(kl + row, tl.sum(kl_RD, axis=1), mask=inside)
        tl.store(kl_free + row, tl.sum(tl.where(live, free_RD, 0.0), axis=1), mask=inside)
        if not ONE_LAUNCH:
            tl.store(per_dim + block * D + dim, tl.sum(kl_RD, axis=0), mask=dim < D)
        for k in tl.range(0, K):
            # Not k.to: the interpreter counts in Python integers.
            sample = tl.full((), 0, tl.int64) + k
            eps = _noise(rng, id_R, k, STREAM, P)
            z_RD = tl.where(live, m + sigma * eps, 0.0)
            tl.store(z + sample * B * D + offset, z_RD, mask=within)
            q_RD = tl.where(live, -0.5 * (1.8378770664093453 + lv + eps * eps), 0.0)
            away = z_RD - pm
            p_RD = tl.where(live, -0.5 * (1.8378770664093453 + plv + away * away * precision), 0.0)
            tl.store(log_q + sample * B + row, tl.sum(q_RD, axis=1), mask=inside)
            tl.store(log_p + sample * B + row, tl.sum(p_RD, axis=1), mask=inside)
    else:
        dim_S = (block - blocks) * SUM_DIMS + tl.arange(0, SUM_DIMS)
        sum_D = tl.zeros((SUM_DIMS,), tl.float32)
        for first in tl.range(0, B, SUM_ROWS):
            row_S = first + tl.arange(0, SUM_ROWS).to(tl.int64)
            real = tl.load(sample_id + row_S, mask=row_S < B, other=-1) >= 0
            m_S, lv_S, pm_S, plv_S = _load_terms(
                mu, logvar, prior_mu, prior_logvar, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride,
                row_S, dim_S, real[:, None] & (dim_S < D)[None, :], HAS_PRIOR_MU, HAS_PRIOR_LOGVAR,
            )  # fmt: skip
            kl_S = 0.5 * (_exp_minus_1_minus(lv_S - plv_S) + (m_S - pm_S) * (m_S - pm_S) * tl.exp(-plv_S))
            sum_D += tl.sum(kl_S, axis=0)
        tl.store(per_dim + dim_S, sum_D, mask=dim_S < D)


@triton.jit
def gaussian_backward_kernel(
    mu, logvar, prior_mu, prior_logvar, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride,
    rng, sample_id, free_bits, grad_z, grad_kl, grad_kl_free, grad_log_q, grad_log_p,
    out_mu, out_logvar, out_prior_mu, out_prior_logvar,
    B, D, K,
    STREAM: tl.constexpr, HAS_PRIOR_MU: tl.constexpr, HAS_PRIOR_LOGVAR: tl.constexpr, HAS_FREE_BITS: tl.constexpr,
    HAS_GRAD_Z: tl.constexpr, HAS_GRAD_KL: tl.constexpr, HAS_GRAD_KL_FREE: tl.constexpr,
    HAS_GRAD_LOG_Q: tl.constexpr, HAS_GRAD_LOG_P: tl.constexpr, NEED_PRIOR: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters of the rows of block `program_id(0)`, [B, D] each."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    dim = tl.arange(0, 2 * P)
    inside = row < B
    within = inside[:, None] & (dim < D)[None, :]
    offset = row[:, None] * D + dim[None, :]
    id_R = tl.load(sample_id + row, mask=inside, other=-1)
    live = within & (id_R >= 0)[:, None]
    m, lv, pm, plv = _load_terms(
        mu, logvar, prior_mu, prior_logvar, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride,
        row, dim, live, HAS_PRIOR_MU, HAS_PRIOR_LOGVAR,
    )  # fmt: skip
    precision = tl.exp(-plv)
    sigma = tl.exp(0.5 * lv)
    gap = m - pm
    curve = _exp_minus_1_minus(lv - plv)
    up = tl.zeros_like(m)
    if HAS_GRAD_KL:
        up += tl.load(grad_kl + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    if HAS_GRAD_KL_FREE:
        above = (0.5 * (curve + gap * gap * precision) <= _floor(free_bits, HAS_FREE_BITS)) == 0
        up += tl.where(above, tl.load(grad_kl_free + row, mask=inside, other=0.0).to(tl.float32)[:, None], 0.0)
    d_mu = up * gap * precision
    d_logvar = 0.5 * up * (curve + (lv - plv))
    d_prior_mu = -d_mu
    d_prior_logvar = -d_logvar - 0.5 * d_mu * gap
    for k in tl.range(0, K):
        sample = tl.full((), 0, tl.int64) + k
        at = sample * B + row
        if HAS_GRAD_LOG_Q:
            d_logvar -= 0.5 * tl.load(grad_log_q + at, mask=inside, other=0.0).to(tl.float32)[:, None]
        if HAS_GRAD_Z or HAS_GRAD_LOG_P:
            eps = _noise(rng, id_R, k, STREAM, P)
            path = tl.zeros_like(m)
            if HAS_GRAD_Z:
                path += tl.load(grad_z + sample * B * D + offset, mask=live, other=0.0).to(tl.float32)
            if HAS_GRAD_LOG_P:
                g = tl.load(grad_log_p + at, mask=inside, other=0.0).to(tl.float32)[:, None]
                away = m + sigma * eps - pm
                pull = g * away * precision
                path -= pull
                d_prior_mu += pull
                d_prior_logvar += 0.5 * (pull * away - g)
            d_mu += path
            d_logvar += 0.5 * sigma * path * eps
    tl.store(out_mu + offset, tl.where(live, d_mu, 0.0), mask=within)
    tl.store(out_logvar + offset, tl.where(live, d_logvar, 0.0), mask=within)
    if NEED_PRIOR:
        tl.store(out_prior_mu + offset, tl.where(live, d_prior_mu, 0.0), mask=within)
        tl.store(out_prior_logvar + offset, tl.where(live, d_prior_logvar, 0.0), mask=within)
