"""Counter-based random numbers: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A number is a function of (key, counter) alone, so noise does not depend on batch order, world size,
accumulation or backend, and is regenerated in the backward pass instead of stored.

    key     (seed, step), 32 bits each
    counter (c0, sample id low, sample id high, stream << 24 | k)

Torch has no unsigned 32-bit arithmetic on every backend, so words live in int64 and are masked.
"""

from __future__ import annotations

import math

import torch

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
# A uniform keeps the upper 24 bits of a word: every such multiple of 2^-24 is an exact float32.
UNIFORM_SHIFT = 8
UNIFORM_SCALE = 2.0**-24

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox_words(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Four 32-bit words per counter, as int64 tensors of the broadcast shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(MULTIPLIER_0, c0)
        high_1, low_1 = _multiply(MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def philox_uniform(rng: torch.Tensor, sample_id: torch.Tensor, position: torch.Tensor, *, stream: int) -> torch.Tensor:
    """float32 uniforms in [0, 1), one per broadcast element of `sample_id` and `position`.

    Args:
        rng: int64[2], (seed, step).
        sample_id: int64, names the sequence.
        position: int64, 0 <= position < 2^32.
        stream: tag below 256 that keeps uses apart.
    """
    shape = torch.broadcast_shapes(sample_id.shape, position.shape)
    sample_id, position = sample_id.expand(shape), position.expand(shape)
    return word_to_uniform(philox_words(_counter(position, sample_id, stream, 0), _key(rng))[0])


def philox_normal(
    rng: torch.Tensor, sample_id_B: torch.Tensor, dim: int, *, num_samples: int, stream: int
) -> torch.Tensor:
    """float32 standard normals [K, B, D].

    One Philox call serves the two dimensions of a pair: words 0 and 1 become two uniforms, and Box-Muller
    turns them into the pair's two normals.
    """
    pairs = torch.arange((dim + 1) // 2, device=sample_id_B.device)
    samples = torch.arange(num_samples, device=sample_id_B.device)
    shape = (num_samples, len(sample_id_B), len(pairs))
    c3 = ((stream << 24) | samples)[:, None, None].expand(shape)
    id_KBJ = sample_id_B[None, :, None].expand(shape)
    counter = (pairs.expand(shape), id_KBJ & MASK, (id_KBJ >> 32) & MASK, c3)
    w0, w1, _, _ = philox_words(counter, _key(rng))
    first, second = box_muller(word_to_uniform(w0), word_to_uniform(w1))
    return torch.stack([first, second], dim=-1).flatten(2)[..., :dim]


def word_to_uniform(word: torch.Tensor) -> torch.Tensor:
    """A 32-bit word as a float32 in [0, 1), exact."""
    return (word >> UNIFORM_SHIFT).to(torch.float32) * UNIFORM_SCALE


def box_muller(u0: torch.Tensor, u1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent standard normals from two uniforms in [0, 1)."""
    # 1 - u lies in (0, 1], so the logarithm is finite.
    radius = torch.sqrt(-2.0 * torch.log(1.0 - u0))
    angle = (2.0 * math.pi) * u1
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _key(rng: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rng[0] & MASK, rng[1] & MASK


def _counter(c0: torch.Tensor, sample_id: torch.Tensor, stream: int, k: int) -> Words:
    c3 = torch.full_like(sample_id, (stream << 24) | k)
    return c0.to(torch.int64), sample_id & MASK, (sample_id >> 32) & MASK, c3


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of constant * word: the product of two 32-bit words overflows int64, halves do not."""
    low_half, high_half = word & 0xFFFF, word >> 16
    low = constant * low_half
    high = constant * high_half
    middle = (low >> 16) + (high & 0xFFFF)
    return ((high >> 16) + (middle >> 16)) & MASK, ((middle << 16) | (low & 0xFFFF)) & MASK
