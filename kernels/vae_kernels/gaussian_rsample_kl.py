"""Reparameterised sample of a diagonal Gaussian with its KL divergence and densities.

Shapes: K samples, B rows (sequences), D latent dimensions. Everything is in nats.

Source: Kingma and Welling, "Auto-encoding variational Bayes" (2014), section 2.4 and appendix B; free bits:
Kingma et al., "Improved variational inference with inverse autoregressive flow" (2016), appendix C.8, here
per row and dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vae_kernels import gaussian_rsample_kl_torch
from vae_kernels.autograd import first_order_only
from vae_kernels.backend import on_device_of, resolve_backend
from vae_kernels.philox import SAMPLES, check_rng


class GaussianSample(NamedTuple):
    """What `gaussian_rsample_kl` returns. float32 below is float64 for float64 inputs.

    Attributes:
        z: [K, B, D], dtype of mu; mu + exp(logvar / 2) * eps.
        kl: float32 [B], analytic KL(q || p), summed over dimensions.
        kl_free: float32 [B], sum over dimensions of max(free_bits, KL of the dimension).
        kl_per_dim: float32 [D], KL of each dimension summed over the rows that are not padding; not
            differentiable.
        log_q: float32 [K, B], log density of z (before it is rounded to mu's dtype) under the posterior.
        log_p: float32 [K, B], the same under the prior.
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
    """Draw z ~ N(mu, exp(logvar)) and score it; see `GaussianSample` for what comes back.

    Gradients flow through z, kl, kl_free, log_q and log_p to mu, logvar and the prior's parameters (log_q's
    along the path through z as well as through its parameters). The noise is counter-based (`philox.py`): it
    is drawn again in backward and never stored. Second derivatives are refused.

    Args:
        mu: [B, D], float16, bfloat16, float32 or float64. Arithmetic is float32, or float64 for float64.
        logvar: [B, D], log of the variance, same dtype.
        rng: int64 [2], (seed, step), on the same device.
        sample_id: int64 [B], position of the row's sequence in the run's global order. A negative id marks
            padding: its outputs and gradients are exactly zero, whatever mu and logvar hold.
        num_samples: K, in [1, 2^24).
        stream: tag of the noise in [0, 256).
        free_bits: nats per dimension and row below which `kl_free` is flat; number or 0-d tensor, no
            gradient.
        prior_mu: [D] or [B, D]; zero when absent.
        prior_logvar: [D] or [B, D]; zero when absent.
        backend: "auto", "triton" or "torch".

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit.
        RuntimeError: backend="triton" where Triton cannot run.
    """
    _check(mu, logvar, rng, sample_id, num_samples, prior_mu, prior_logvar)
    check_rng(rng, sample_id, stream)
    chosen = resolve_backend(backend, mu)
    return GaussianSample(
        *_forward(
            mu, logvar, prior_mu, prior_logvar, rng, sample_id, _threshold(free_bits, mu), num_samples, stream, chosen
        )
    )


def _threshold(free_bits: float | torch.Tensor, mu: torch.Tensor) -> torch.Tensor | None:
    """As the operator takes it; None for none, which spares a launch."""
    if not isinstance(free_bits, torch.Tensor):
        # Filled on the device: a copy from the host could not be captured in a CUDA graph.
        return torch.full((), free_bits, dtype=_wide(mu), device=mu.device) if free_bits else None
    if free_bits.dim() != 0:
        raise ValueError(f"free_bits must be a number or a 0-d tensor, got shape {tuple(free_bits.shape)}")
    return free_bits.detach().to(mu.device, _wide(mu))


@torch.library.custom_op("vae_kernels::gaussian_rsample_kl", mutates_args=())
def _forward(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    rng: torch.Tensor,
    sample_id: torch.Tensor,
    free_bits: torch.Tensor | None,
    num_samples: int,
    stream: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with on_device_of(mu):
        z, kl, kl_free, kl_per_dim, log_q, log_p = _implementation(backend).forward(
            mu, logvar, prior_mu, prior_logvar, rng, sample_id, free_bits, num_samples, stream
        )
    return z, kl, kl_free, kl_per_dim, log_q, log_p


@_forward.register_fake
def _(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    rng: torch.Tensor,
    sample_id: torch.Tensor,
    free_bits: torch.Tensor | None,
    num_samples: int,
    stream: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (rows, dim), dtype = mu.shape, _wide(mu)
    return (
        mu.new_empty(num_samples, rows, dim),
        mu.new_empty(rows, dtype=dtype),
        mu.new_empty(rows, dtype=dtype),
        mu.new_empty(dim, dtype=dtype),
        mu.new_empty(num_samples, rows, dtype=dtype),
        mu.new_empty(num_samples, rows, dtype=dtype),
    )


@torch.library.custom_op("vae_kernels::gaussian_rsample_kl_backward", mutates_args=())
def _backward(
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    grad_kl_free: torch.Tensor | None,
    grad_log_q: torch.Tensor | None,
    grad_log_p: torch.Tensor | None,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    rng: torch.Tensor,
    sample_id: torch.Tensor,
    free_bits: torch.Tensor | None,
    num_samples: int,
    stream: int,
    backend: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (mu, logvar, prior_mu, prior_logvar); an empty tensor where none is needed."""
    parameters = (mu, logvar, prior_mu, prior_logvar)
    with on_device_of(mu):
        grads = _implementation(backend).backward(
            *parameters, rng, sample_id, free_bits, num_samples, stream,
            (grad_z, grad_kl, grad_kl_free, grad_log_q, grad_log_p), tuple(needs),
        )  # fmt: skip
    first, second, third, fourth = (
        mu.new_empty(0) if grad is None or parameter is None else grad.sum_to_size(parameter.shape).to(parameter.dtype)
        for grad, parameter in zip(grads, parameters, strict=True)
    )
    return first, second, third, fourth


@_backward.register_fake
def _(
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    grad_kl_free: torch.Tensor | None,
    grad_log_q: torch.Tensor | None,
    grad_log_p: torch.Tensor | None,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    rng: torch.Tensor,
    sample_id: torch.Tensor,
    free_bits: torch.Tensor | None,
    num_samples: int,
    stream: int,
    backend: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second, third, fourth = (
        parameter.new_empty(parameter.shape) if needed and parameter is not None else mu.new_empty(0)
        for needed, parameter in zip(needs, (mu, logvar, prior_mu, prior_logvar), strict=True)
    )
    return first, second, third, fourth


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.num_samples, ctx.stream, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3])


@first_order_only
def _derivative(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    used = [grad for index, grad in enumerate(upstream) if index != 3]
    grads = _backward(*used, *ctx.saved_tensors, ctx.num_samples, ctx.stream, ctx.backend, needs)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *(None,) * 6)


_forward.register_autograd(_derivative, setup_context=_context)


def _wide(mu: torch.Tensor) -> torch.dtype:
    return torch.promote_types(mu.dtype, torch.float32)


def _implementation(backend: str) -> Any:
    if backend == "torch":
        return gaussian_rsample_kl_torch
    # Triton is imported only once its kernels are wanted.
    from vae_kernels import gaussian_rsample_kl_triton

    return gaussian_rsample_kl_triton


def _check(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    rng: torch.Tensor,
    sample_id: torch.Tensor,
    num_samples: int,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
) -> None:
    if mu.dim() != 2 or logvar.shape != mu.shape:
        raise ValueError(f"mu and logvar must be [B, D] alike, got {tuple(mu.shape)} and {tuple(logvar.shape)}")
    if not mu.is_floating_point() or logvar.dtype != mu.dtype:
        raise TypeError(f"mu and logvar must share one floating dtype, got {mu.dtype} and {logvar.dtype}")
    if sample_id.shape != mu.shape[:1]:
        raise ValueError(f"sample_id must have shape ({mu.shape[0]},), got {tuple(sample_id.shape)}")
    for name, tensor in (("logvar", logvar), ("rng", rng), ("sample_id", sample_id)):
        if tensor.device != mu.device:
            raise ValueError(f"{name} is on {tensor.device} and mu on {mu.device}; move it there")
    if not 1 <= num_samples < SAMPLES:
        raise ValueError(f"num_samples is {num_samples}; it must be in [1, {SAMPLES})")
    for name, prior in (("prior_mu", prior_mu), ("prior_logvar", prior_logvar)):
        if prior is not None and prior.shape not in (mu.shape, mu.shape[1:]):
            raise ValueError(f"{name} must be [D] or [B, D] for mu {tuple(mu.shape)}, got {tuple(prior.shape)}")
