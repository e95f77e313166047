"""A training step of a small Transformer text VAE, in plain torch, with and without the kernels.

Shapes: B sequences of T tokens, H hidden, V vocabulary, D latent dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from contenders import compiled
from correctness import WrongKernelError
from report import ratio
from timing import Turn, alternate, device_turn, host_turn
from torch import nn

import vae_kernels

# Largest relative difference of the losses, and of the gradient of all parameters, between with and without.
_ALLOWED = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-2, 5e-2)}
_BETA = 0.1


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and the batch."""

    batch: int
    tokens: int
    hidden: int
    layers: int
    heads: int
    latent: int
    vocabulary: int


SIZES = {
    "cpu": Sizes(batch=16, tokens=32, hidden=128, layers=2, heads=4, latent=32, vocabulary=10000),
    "cuda": Sizes(batch=256, tokens=32, hidden=768, layers=6, heads=12, latent=64, vocabulary=50304),
}


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and with a residual; [B, T, H] to the same."""

    def __init__(self, hidden: int, heads: int, is_causal: bool) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.norm_attention, self.norm_mlp = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, h_BTH: torch.Tensor) -> torch.Tensor:
        """One layer."""
        batch, tokens, hidden = h_BTH.shape
        split = self.qkv(self.norm_attention(h_BTH)).view(batch, tokens, 3, self.heads, hidden // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        h_BTH = h_BTH + self.out(mixed.transpose(1, 2).reshape(batch, tokens, hidden))
        return h_BTH + self.mlp(self.norm_mlp(h_BTH))


class TextVAE(nn.Module):
    """Encoder, Gaussian posterior, causal decoder; token t is decoded from z and the tokens before it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.position = nn.Parameter(0.02 * torch.randn(sizes.tokens, sizes.hidden))
        self.encoder = nn.Sequential(*(Block(sizes.hidden, sizes.heads, False) for _ in range(sizes.layers)))
        self.posterior = nn.Linear(sizes.hidden, 2 * sizes.latent)
        self.from_latent = nn.Linear(sizes.latent, sizes.hidden)
        self.decoder = nn.Sequential(*(Block(sizes.hidden, sizes.heads, True) for _ in range(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.hidden)
        self.head = nn.Parameter(sizes.hidden**-0.5 * torch.randn(sizes.vocabulary, sizes.hidden))

    def encode(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the posterior, float32 [B, D] each."""
        pooled_BH = self.encoder(self.embedding(tokens_BT) + self.position).mean(1)
        mu_BD, logvar_BD = self.posterior(pooled_BH).float().chunk(2, -1)
        return mu_BD, logvar_BD

    def decode(self, tokens_BT: torch.Tensor, z_BD: torch.Tensor) -> torch.Tensor:
        """States [B T, H] that predict the tokens: each position sees what is before it, the first only z."""
        before_BT = F.pad(tokens_BT[:, :-1], (1, 0))
        h_BTH = self.embedding(before_BT) + self.position + self.from_latent(z_BD)[:, None]
        return self.norm(self.decoder(h_BTH)).flatten(0, 1)


@dataclass(frozen=True)
class Batch:
    """tokens [B, T]; rng [2] and sample ids [B] of the noise; offsets [B + 1] and weights 1 / B of the sequences."""

    tokens: torch.Tensor
    rng: torch.Tensor
    ids: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor


def with_kernels(model: TextVAE, batch: Batch) -> torch.Tensor:
    """Mean over the sequences of reconstruction and weighted KL, nats."""
    mu_BD, logvar_BD = model.encode(batch.tokens)
    latent = vae_kernels.gaussian_rsample_kl(mu_BD, logvar_BD, batch.rng, batch.ids)
    rec, _ = vae_kernels.linear_cross_entropy(
        model.decode(batch.tokens, latent.z[0]),
        model.head,
        batch.tokens.flatten(),
        cu_seqlens=batch.offsets,
        weight_per_sequence=batch.weights,
    )
    return rec + _BETA * latent.kl.mean()


def without_kernels(model: TextVAE, batch: Batch, noise_BD: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain torch, with fresh noise or the given."""
    mu_BD, logvar_BD = model.encode(batch.tokens)
    noise_BD = torch.randn_like(mu_BD) if noise_BD is None else noise_BD
    states_NH = model.decode(batch.tokens, mu_BD + torch.exp(0.5 * logvar_BD) * noise_BD)
    logits_NV = F.linear(states_NH, model.head)
    rec = F.cross_entropy(logits_NV.float(), batch.tokens.flatten(), reduction="sum") / len(batch.tokens)
    kl_B = -0.5 * (1.0 + logvar_BD - mu_BD.square() - logvar_BD.exp()).sum(-1)
    return rec + _BETA * kl_B.mean()


def measure(device: str, repeats: int, sizes: Sizes | None = None) -> dict[str, Any]:
    """Milliseconds of a whole step (forward, backward, AdamW) of each contender, after the gate.

    Raises:
        WrongKernelError: with the kernels the loss or the gradient is another.
    """
    torch.compiler.reset()
    sizes = sizes or SIZES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model, batch = TextVAE(sizes).to(device), _batch(sizes, device)
    differences = _compare(model, batch, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = {
        "without_kernels": without_kernels,
        "compile_without_kernels": compiled(without_kernels),
        "with_kernels": with_kernels,
    }
    steps = {name: _step(loss, model, batch, optimizer, dtype) for name, loss in losses.items()}
    could_not_run = _warm_up(steps)
    times = alternate({name: _turn(step, device) for name, step in steps.items()}, repeats)
    peers = {name: time for name, time in times.items() if name != "with_kernels"}
    best_peer = min(peers, key=peers.__getitem__)
    entry = {"settings": {"device": device, "dtype": str(dtype).removeprefix("torch."), **asdict(sizes)},
             "milliseconds": times,
             "ratio_without_kernels": ratio(times, "without_kernels", "with_kernels"),
             "best_peer": best_peer,
             "ratio_best_peer": ratio(times, best_peer, "with_kernels"),
             "difference": differences,
             "could_not_run": could_not_run}  # fmt: skip
    if device == "cuda":
        entry["peak_bytes"] = {name: _peak_bytes(step) for name, step in steps.items()}
    return entry


def _batch(sizes: Sizes, device: str) -> Batch:
    tokens_BT = torch.randint(0, sizes.vocabulary, (sizes.batch, sizes.tokens), device=device)
    return Batch(
        tokens_BT,
        torch.tensor([1, 2], device=device),
        torch.arange(sizes.batch, device=device),
        sizes.tokens * torch.arange(sizes.batch + 1, device=device),
        torch.full((sizes.batch,), 1.0 / sizes.batch, device=device),
    )


def _compare(model: TextVAE, batch: Batch, dtype: torch.dtype) -> dict[str, float]:
    """Relative difference of loss and gradient with and without the kernels, on the same noise."""
    dim = model.from_latent.in_features
    noise_BD = vae_kernels.philox_normal(batch.rng, batch.ids, dim, num_samples=1, stream=0)[0]
    plain, wanted = _loss_and_gradient(lambda: without_kernels(model, batch, noise_BD), model, dtype)
    fused, actual = _loss_and_gradient(lambda: with_kernels(model, batch), model, dtype)
    found = {
        "loss": abs(fused - plain) / abs(plain),
        "gradient": ((actual - wanted).norm() / wanted.norm()).item(),
    }
    for (name, difference), allowed in zip(found.items(), _ALLOWED[dtype], strict=True):
        if not difference <= allowed:
            raise WrongKernelError(f"training step: {name} differs by {difference:.3g}, allowed {allowed}")
    return {name: float(f"{difference:.3g}") for name, difference in found.items()}


def _loss_and_gradient(
    loss: Callable[[], torch.Tensor], model: TextVAE, dtype: torch.dtype
) -> tuple[float, torch.Tensor]:
    """The loss and the gradient of all parameters in one vector."""
    with torch.autocast(model.head.device.type, dtype, enabled=dtype != torch.float32):
        value = loss()
    gradients = torch.autograd.grad(value, list(model.parameters()))
    return value.item(), torch.cat([gradient.flatten().float() for gradient in gradients])


def _step(
    loss: Callable[..., torch.Tensor],
    model: TextVAE,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(model.head.device.type, dtype, enabled=dtype != torch.float32):
            value = loss(model, batch)
        value.backward()
        optimizer.step()

    return step


def _turn(step: Callable[[], None], device: str) -> Turn:
    # On a GPU an untimed step goes before, so that the host is as far ahead as it is in training.
    return device_turn(step, step) if device == "cuda" else host_turn(step, lambda: None)


def _warm_up(steps: dict[str, Callable[[], None]]) -> dict[str, str]:
    """Run each once; a compiled one that cannot leaves `steps` and comes back with its reason."""
    reasons = {}
    for name, step in list(steps.items()):
        try:
            step()
        except Exception as error:
            if not name.startswith("compile"):
                raise
            reasons[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            del steps[name]
    return reasons


def _peak_bytes(step: Callable[[], None]) -> int:
    """Peak of the allocator in one step, model and optimizer included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
