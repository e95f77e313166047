"""What a posterior draws, and what the pieces of the latent promise to each other.

Shapes: K samples, R rows (sequences, or tokens where each has a z of its own), D latent dimensions, H width of the
encoder's output.

    encoder     embeddings -> h_RH
    posterior   (h_RH) -> mean_RD, logvar_RD;   `draw` -> LatentSample
    prior       (z_RD) -> log p(z), float32 [R];   `from_noise(normal_RD, uniform_R)` -> z_RD
    decoder     (embeddings, z) -> hidden states; `new_state` and `step` for one token at a time

A decoder's state is a list of tensors with a row for each sequence, so that `[tensor[:8] for tensor in state]` is the
state of the first eight. `new_state(rows, max_tokens)` allocates it; `step(x_BE, z_BD, state, position_B, span)` writes
one token of every row into it and returns the hidden states. Rows are strangers: each is at a position of its own,
and one at `first_position` begins a sequence, whatever its state held. That position is -1 where something stands
before the first token (a prefix made of z; the step's hidden state is then of no use), else 0. `z_BD` is the position's
own where each has one. No position reaches `span`, which bounds what attention looks back at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class LatentSample(NamedTuple):
    """K samples of every row's posterior, in nats; float32 (float64 in a float64 model).

    Attributes:
        z: [K, R, D].
        kl: [R], KL(q || p): in closed form, or for a prior without one -H(q) - mean over the samples of log p(z).
        kl_free: [R], the sum over dimensions of max(free_bits, KL of the dimension); equal to `kl` where the KL has no
            dimensions.
        kl_per_dim: [D], summed over the rows that are not padding, detached; [0] where the KL has no dimensions.
        log_q: [K, R], log density of z under its posterior.
        log_p: [K, R], log density of z under the prior.
    """

    z: torch.Tensor
    kl: torch.Tensor
    kl_free: torch.Tensor
    kl_per_dim: torch.Tensor
    log_q: torch.Tensor
    log_p: torch.Tensor
