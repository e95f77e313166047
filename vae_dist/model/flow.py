"""The affine coupling layer of a normalising flow (RealNVP).

Shapes: R rows, D latent dimensions.

Source: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP" (2017), sections 3.2-3.4.
"""

from __future__ import annotations

import torch
from torch import nn

# A layer scales by exp(-2) to exp(2): no step of training can make a scale that float32 cannot undo.
_LOG_SCALE_BOUND = 2.0


class AffineCoupling(nn.Module):
    """One half of z is shifted and scaled by functions of the other half, which stays.

    `forward` goes from data to noise, u = (z - shift) exp(-log_scale), and `inverse` back. Both functions are bounded,
    so the tails stay those of Gaussians. The layer starts as the identity.
    """

    def __init__(self, dim: int, hidden_dim: int, *, change_first: bool) -> None:
        """`dim` is D, 2 or more; the first half is the smaller one where D is odd."""
        super().__init__()
        self.sizes, self.change_first = (dim // 2, dim - dim // 2), change_first
        changed, kept = self.sizes if change_first else self.sizes[::-1]
        self.network = nn.Sequential(
            nn.Linear(kept, hidden_dim),
            nn.Tanh(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.Tanh(),
            nn.Linear(hidden_dim, 2 * changed),
        )
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, z_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u, [R, D], and log |det du/dz|, [R]."""
        kept, changed = self._split(z_RD)
        shift, log_scale = self._affine(kept)
        return self._join(kept, (changed - shift) * (-log_scale).exp()), -log_scale.sum(-1)

    def inverse(self, u_RD: torch.Tensor) -> torch.Tensor:
        """z, [R, D]."""
        kept, changed = self._split(u_RD)
        shift, log_scale = self._affine(kept)
        return self._join(kept, changed * log_scale.exp() + shift)

    def _affine(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shift, raw = self.network(kept).chunk(2, dim=-1)
        return shift, _LOG_SCALE_BOUND * (raw / _LOG_SCALE_BOUND).tanh()

    def _split(self, x_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = x_RD.split(self.sizes, dim=-1)
        return (second, first) if self.change_first else (first, second)

    def _join(self, kept: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
        return torch.cat((changed, kept) if self.change_first else (kept, changed), dim=-1)
