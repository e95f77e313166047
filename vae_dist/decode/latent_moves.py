"""Ways through the latent space: from points that texts have to points that may be decoded.

Shapes: D latent, T tokens, n points. `is_sphere`: latents lie on the unit sphere, and so do the points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vae_kernels import gaussian_rsample_kl

NEIGHBOR_STREAM = 8
_KEY = torch.zeros(2, dtype=torch.int64)


def between(a_D: torch.Tensor, b_D: torch.Tensor, t: torch.Tensor, path: str, is_sphere: bool) -> torch.Tensor:
    """The point t of the way from a to b, along a line or, with `path = slerp`, a great circle."""
    point_D = slerp(a_D, b_D, t) if path == "slerp" else torch.lerp(a_D, b_D, t)
    return on_sphere(point_D) if is_sphere else point_D


def neighbors(mean: torch.Tensor, radius: float, count: int, seed: int, is_sphere: bool) -> torch.Tensor:
    """`count` points at `radius` from `mean` [D] or [T, D] (every token's latent moves by so much), in directions that
    are drawn with seed, seed + 1, ... and are equally likely; on the sphere the points are projected onto it."""
    seed_n = torch.arange(seed, seed + count)
    zeros = torch.zeros(count, mean.numel())
    noise = gaussian_rsample_kl(zeros, zeros, _KEY, seed_n, stream=NEIGHBOR_STREAM, backend="torch").z[0]
    step = F.normalize(noise.view(count, *mean.shape).to(mean), dim=-1)
    points = mean + radius * step
    return on_sphere(points) if is_sphere else points


def analogy(a_D: torch.Tensor, b_D: torch.Tensor, c_D: torch.Tensor, strength: float, is_sphere: bool) -> torch.Tensor:
    """a is to b as c is to this point: c + strength (b - a)."""
    point_D = c_D + strength * (b_D - a_D)
    return on_sphere(point_D) if is_sphere else point_D


def traverse(mean_D: torch.Tensor, dimension: int, values: list[float], is_sphere: bool) -> torch.Tensor:
    """[n, D]: the mean with one dimension at each of the values."""
    points = mean_D.repeat(len(values), 1)
    points[:, dimension] = torch.tensor(values, dtype=mean_D.dtype, device=mean_D.device)
    return on_sphere(points) if is_sphere else points


def on_sphere(points: torch.Tensor) -> torch.Tensor:
    """Points scaled to unit length."""
    return F.normalize(points, dim=-1)


def slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of direction with linear interpolation of length.

    A line where there is no one great circle: for parallel vectors and from or to the origin.
    """
    length_a, length_b = a.norm(), b.norm()
    cosine = (a @ b / (length_a * length_b).clamp(min=1e-12)).clamp(-1.0, 1.0)
    angle = torch.acos(cosine)
    if float(angle.sin()) < 1e-4 or float(torch.minimum(length_a, length_b)) == 0.0:
        return torch.lerp(a, b, t)
    direction = (torch.sin((1 - t) * angle) * a / length_a + torch.sin(t * angle) * b / length_b) / angle.sin()
    return direction * torch.lerp(length_a, length_b, t)
