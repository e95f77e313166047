"""Counter-based noise: Philox-4x32-10 in torch, vectorised over the counters.

Every number is a pure function of (seed, step), the sequence, the position in it and a stream tag. Nothing is
drawn from a global generator and nothing is stored, so noise does not depend on the batch, the world size,
the backend or a restart.

    key      k0 = seed mod 2^32      k1 = step mod 2^32
    counter  c0 = position or dimension pair    c1, c2 = low, high half of the 64-bit sample id
             c3 = stream * 2^24 + k  (k: which of the K samples)

Words are held in int64 tensors with values in [0, 2^32): torch has little arithmetic for unsigned types.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), sections 4.2-4.3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from vae_kernels.compiled import compiled

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_ROUNDS = 10

STREAMS = 2**8
SAMPLES = 2**24

# Below this many numbers the seconds of compiling are not won back.
COMPILE_ELEMENTS = 2**16

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox_words(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Philox-4x32-10 of the broadcast counters: four int64 tensors of 32-bit words."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(_ROUNDS):
        # The product wraps modulo 2^64; the mask after the arithmetic shift gives the unsigned high word all
        # the same.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _WORD) ^ c1 ^ k0,
            product_1 & _WORD,
            ((product_0 >> 32) & _WORD) ^ c3 ^ k1,
            product_0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def unit_interval(word: torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1): the word's upper 24 bits, exactly."""
    return (word >> 8).float() * 2.0**-24


def unit_interval_without_zero(word: torch.Tensor) -> torch.Tensor:
    """float32 in (0, 1], fine near zero, where a normal's tail comes from: the odd word nearest, over 2^32.

    The conversion rounds to nearest even on every backend and the scale is a power of two, so the result is
    the same bit for bit.
    """
    return (word | 1).float() * 2.0**-32


def philox_uniform(rng: torch.Tensor, sample_id: torch.Tensor, position: torch.Tensor, *, stream: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float32, of the broadcast shape of `sample_id` and `position`.

    Args:
        rng: int64 [2], (seed, step), on the same device.
        sample_id: int64, position of the sequence in the run's global order.
        position: int64, position within the sequence, below 2^32.
        stream: tag in [0, 256); two streams never share a counter.
    """
    check_rng(rng, sample_id, stream)
    count = torch.broadcast_shapes(sample_id.shape, position.shape).numel()
    return _best(_uniform, count, rng)(rng, sample_id, position, stream)


def philox_normal(
    rng: torch.Tensor, sample_id_B: torch.Tensor, dim: int, *, num_samples: int, stream: int
) -> torch.Tensor:
    """Standard normal noise, float32 [K, B, D]; entry (k, b, d) depends on rng, sample_id[b], k, d and stream
    only.

    Args:
        rng: int64 [2], (seed, step).
        sample_id_B: int64 [B].
        dim: D.
        num_samples: K, in [1, 2^24).
        stream: tag in [0, 256).
    """
    check_rng(rng, sample_id_B, stream)
    return _best(_normal, num_samples * len(sample_id_B) * dim, rng)(rng, sample_id_B, dim, num_samples, stream)


def _uniform(rng: torch.Tensor, sample_id: torch.Tensor, position: torch.Tensor, stream: int) -> torch.Tensor:
    tag = torch.full((), stream << 24, dtype=torch.int64, device=rng.device)
    word, _, _, _ = _keyed_words(rng, position.long() & _WORD, sample_id, tag)
    return unit_interval(word)


def _normal(rng: torch.Tensor, sample_id_B: torch.Tensor, dim: int, num_samples: int, stream: int) -> torch.Tensor:
    word_0, word_1 = normal_words(rng, sample_id_B, dim, num_samples=num_samples, stream=stream)
    # In float64: torch's float32 logarithm differs in the last bit between a vector's body and its tail,
    # which would let the noise of a row depend on where in the batch the row is.
    radius = torch.sqrt(-2.0 * torch.log(unit_interval_without_zero(word_0).double()))
    angle = (2.0 * math.pi) * unit_interval(word_1).double()
    pairs_KBP2 = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs_KBP2.flatten(-2)[..., :dim].float()


def _best(function: Callable[..., torch.Tensor], count: int, rng: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The function, compiled where that pays: some hundred operators become one loop, bit for bit."""
    worth = rng.device.type == "cpu" and count >= COMPILE_ELEMENTS and not torch.compiler.is_compiling()
    return _compiled(function) if worth else function


_compiled = functools.cache(compiled)


def normal_words(
    rng: torch.Tensor, sample_id_B: torch.Tensor, dim: int, *, num_samples: int, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two words behind each pair of normals (radius, angle), int64 [K, B, ceil(D / 2)] each."""
    device = sample_id_B.device
    pair_P = torch.arange((dim + 1) // 2, device=device)
    sample_K11 = torch.arange(num_samples, device=device)[:, None, None]
    words = _keyed_words(rng, pair_P, sample_id_B[:, None], (stream << 24) | sample_K11)
    return words[0], words[1]


def check_rng(rng: torch.Tensor, sample_id: torch.Tensor, stream: int) -> None:
    """Raise TypeError or ValueError when the key, the ids or the stream tag are not usable."""
    if rng.dtype != torch.int64 or rng.shape != (2,):
        raise TypeError(f"rng must be int64 of shape (2,), (seed, step); got {rng.dtype} {tuple(rng.shape)}")
    if sample_id.dtype != torch.int64:
        raise TypeError(f"sample_id must be int64, got {sample_id.dtype}")
    if not 0 <= stream < STREAMS:
        raise ValueError(f"stream is {stream}; it must be in [0, {STREAMS})")


def _keyed_words(rng: torch.Tensor, c0: torch.Tensor, sample_id: torch.Tensor, c3: torch.Tensor) -> Words:
    return philox_words((c0, sample_id & _WORD, (sample_id >> 32) & _WORD, c3), (rng[0] & _WORD, rng[1] & _WORD))
