"""`gaussian_rsample_kl` beside the same in plain torch: launches, device time, time of forward and of backward.

Shapes: B sequences, D latent dimensions, one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contenders import compiled
from correctness import WrongKernelError
from report import ratio
from timing import Turn, alternate, device_turn, host_turn
from torch.profiler import ProfilerActivity, profile

import vae_kernels

ROWS, DIMENSIONS = 512, 64
# z and the gradients are rounded once to bfloat16 (2^-9 relative); the KL stays float32.
_ALLOWED = {"z": 4e-3, "kl": 1e-5, "dmu": 4e-3, "dlogvar": 4e-3}

Pair = tuple[torch.Tensor, torch.Tensor]


def measure(device: str, repeats: int) -> dict[str, Any]:
    """Milliseconds, kernel launches and device microseconds of each contender and direction, after the gate.

    Raises:
        WrongKernelError: ours is not within rounding of float64.
    """
    torch.compiler.reset()
    mu_BD, logvar_BD, grad_BD = _draw(device)
    upstream = (grad_BD, torch.full((ROWS,), 1.0 / ROWS, device=device))
    rng, ids_B = torch.tensor([3, 5], device=device), torch.arange(ROWS, device=device)
    ours = partial(_ours, rng=rng, ids_B=ids_B)
    errors = _errors(ours, mu_BD, logvar_BD, upstream, rng, ids_B)
    wrong = [
        f"{name}: {error:.3g}, allowed {_ALLOWED[name]}"
        for name, error in errors.items()
        if not error <= _ALLOWED[name]
    ]
    if wrong:
        raise WrongKernelError("gaussian_rsample_kl:\n  " + "\n  ".join(wrong))
    forms: dict[str, Callable[..., Pair]] = {"eager": eager, "compile": compiled(eager), "ours": ours}
    entry: dict[str, Any] = {"settings": {"device": device, "B": ROWS, "D": DIMENSIONS, "K": 1, "dtype": "bfloat16"}}
    could_not_run = _warm_up(forms, mu_BD, logvar_BD, upstream)
    for direction, make in (("forward", _forward), ("backward", _backward)):
        runs = {name: make(form, mu_BD, logvar_BD, upstream) for name, form in forms.items()}
        times = alternate({name: _turn(run, device) for name, run in runs.items()}, repeats)
        entry[f"{direction}_milliseconds"] = times
        entry[f"{direction}_ratio_eager"] = ratio(times, "eager", "ours")
        if device == "cuda":
            activity = {name: _device_activity(run) for name, run in runs.items()}
            entry[f"{direction}_launches"] = {name: launches for name, (launches, _) in activity.items()}
            entry[f"{direction}_device_microseconds"] = {name: us for name, (_, us) in activity.items()}
    return entry | {"error_vs_fp64": {name: float(f"{error:.3g}") for name, error in errors.items()},
                    "could_not_run": could_not_run}  # fmt: skip


def eager(mu_BD: torch.Tensor, logvar_BD: torch.Tensor) -> Pair:
    """(z [B, D], kl [B]) as a VAE in plain torch writes them."""
    mu, logvar = mu_BD.float(), logvar_BD.float()
    z_BD = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    kl_B = -0.5 * (1.0 + logvar - mu.square() - logvar.exp()).sum(-1)
    return z_BD.to(mu_BD.dtype), kl_B


def _ours(mu_BD: torch.Tensor, logvar_BD: torch.Tensor, *, rng: torch.Tensor, ids_B: torch.Tensor) -> Pair:
    latent = vae_kernels.gaussian_rsample_kl(mu_BD, logvar_BD, rng, ids_B)
    return latent.z[0], latent.kl


def _draw(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mu, logvar, gradient of z), bfloat16 [B, D] each."""
    generator = torch.Generator(device).manual_seed(0)
    mu_BD, logvar_BD, grad_BD = torch.randn(3, ROWS, DIMENSIONS, generator=generator, device=device).bfloat16()
    return mu_BD.clone().requires_grad_(), logvar_BD.clone().requires_grad_(), grad_BD


def _errors(
    form: Callable[..., Pair],
    mu_BD: torch.Tensor,
    logvar_BD: torch.Tensor,
    upstream: Pair,
    rng: torch.Tensor,
    ids_B: torch.Tensor,
) -> dict[str, float]:
    """Frobenius norm of each error over that of the result, against float64 with the same noise."""
    z_BD, kl_B = form(mu_BD, logvar_BD)
    found = (z_BD, kl_B, *torch.autograd.grad((z_BD, kl_B), (mu_BD, logvar_BD), upstream))
    noise = vae_kernels.philox_normal(rng, ids_B, DIMENSIONS, num_samples=1, stream=0)[0].double()
    mu, logvar = mu_BD.detach().double(), logvar_BD.detach().double()
    g_z, g_kl = upstream[0].double(), upstream[1].double()[:, None]
    sigma, variance = torch.exp(0.5 * logvar), logvar.exp()
    wanted = (
        mu + sigma * noise,
        0.5 * (variance + mu.square() - 1.0 - logvar).sum(-1),
        g_z + g_kl * mu,
        0.5 * sigma * noise * g_z + 0.5 * g_kl * (variance - 1.0),
    )
    pairs = zip(_ALLOWED, found, wanted, strict=True)
    return {name: ((actual.double() - want).norm() / want.norm()).item() for name, actual, want in pairs}


def _warm_up(
    forms: dict[str, Callable[..., Pair]], mu_BD: torch.Tensor, logvar_BD: torch.Tensor, upstream: Pair
) -> dict[str, str]:
    """Run each once; those that cannot leave `forms` and come back with their reason."""
    reasons = {}
    for name, form in list(forms.items()):
        try:
            _backward(form, mu_BD, logvar_BD, upstream)()
        except Exception as error:
            if name == "ours":
                raise
            reasons[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            del forms[name]
    return reasons


def _forward(form: Callable[..., Pair], mu_BD: torch.Tensor, logvar_BD: torch.Tensor, _: Pair) -> Callable[[], object]:
    return partial(form, mu_BD, logvar_BD)


def _backward(
    form: Callable[..., Pair], mu_BD: torch.Tensor, logvar_BD: torch.Tensor, upstream: Pair
) -> Callable[[], object]:
    outputs = form(mu_BD, logvar_BD)
    return lambda: torch.autograd.grad(outputs, (mu_BD, logvar_BD), upstream, retain_graph=True)


def _turn(run: Callable[[], object], device: str) -> Turn:
    # Once untimed first: this is bound by launches, and the host must be ahead of the device.
    return device_turn(run, run) if device == "cuda" else host_turn(run, run)


def _device_activity(run: Callable[[], object]) -> tuple[int, float]:
    """(launches of kernels, copies and fills; microseconds they ran) of one call on the GPU."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    on_device = [
        event
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return len(on_device), round(sum(event.time_range.elapsed_us() for event in on_device), 2)
