"""Dropout over sequences.

Shapes: B sequences, T positions, H features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SequenceDropout(nn.Module):
    """Dropout with a mask for every position, or with one mask for all positions of a sequence.

    The second is variational dropout (Gal and Ghahramani 2016, section 4): the mask is a sample of the weights, so it
    must not change within a sequence. Off in evaluation. Masks come from torch's generator.
    """

    def __init__(self, p: float, shared: bool) -> None:
        super().__init__()
        self.p, self.shared = p, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features that stay are scaled by 1 / (1 - p); any shape, with a shared mask [B, T, H]."""
        if not (self.shared and self.training and self.p):
            return F.dropout(x, self.p, self.training)
        return x * F.dropout(torch.ones_like(x[:, :1]), self.p)
