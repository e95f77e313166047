"""Philox noise inside Triton kernels: the words and uniforms of `philox.py` bit for bit.

Import this only where Triton is available. The key is loaded from a device tensor, so that a captured CUDA
graph draws new noise when the tensor changes.
"""

# Triton reads a kernel's annotations as its own, so kernels carry none.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_uniform_pair(rng, sample_id_R1, pair_1P, tag_1P):
    """float32 [R, P] twice: in (0, 1] for the radius, in [0, 1) for the angle.

    `rng` points to int64 (seed, step); sample_id_R1 is int64, pair_1P int32, tag_1P uint32 (stream * 2^24 +
    k).
    """
    key = (tl.load(rng) & 0xFFFFFFFF) | (tl.load(rng + 1) << 32)
    pair_RP, id_RP = tl.broadcast(pair_1P, sample_id_R1)
    tag_RP, _ = tl.broadcast(tag_1P, id_RP)
    low = (id_RP & 0xFFFFFFFF).to(tl.uint32)
    high = ((id_RP >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word_0, word_1, _, _ = tl.philox(key, pair_RP.to(tl.uint32), low, high, tag_RP)
    radius = (word_0 | 1).to(tl.float32) * 2.3283064365386963e-10
    angle = (word_1 >> 8).to(tl.float32) * 5.9604644775390625e-08
    return radius, angle


@triton.jit
def normal_pair(radius_uniform, angle_uniform):
    """Box-Muller: two standard normals of the pair.

    Sine and cosine are Taylor series on [-pi/4, pi/4] after an exact reduction by quarter turns: as accurate
    as the library's, without its slow path and the stack it needs.
    """
    radius = tl.sqrt(-2.0 * tl.log(radius_uniform))
    quarters = 4.0 * angle_uniform
    quadrant = tl.floor(quarters + 0.5)
    x = (quarters - quadrant) * 1.5707963267948966
    s = x * x
    sine = x * (1.0 + s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880)))))
    cosine = 1.0 + s * (-0.5 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 + s * (-1.0 / 3628800)))))
    turn = quadrant.to(tl.int32) & 3
    odd = (turn & 1) == 1
    cos_sign = tl.where((turn == 1) | (turn == 2), -1.0, 1.0)
    sin_sign = tl.where(turn >= 2, -1.0, 1.0)
    return radius * cos_sign * tl.where(odd, sine, cosine), radius * sin_sign * tl.where(odd, cosine, sine)
