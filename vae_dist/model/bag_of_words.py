"""The linear text VAE's encoder and decoder: the order of the words is neither read nor written.

Shapes: B sequences, T positions, E embedding, D latent.

A sequence is its counts c_V. The encoder is linear in the normalised counts; the decoder gives every word the same
softmax over the vocabulary, log p(x | z) = sum_v c_v log softmax(W z + b)_v (neural variational document model, Miao
et al. 2016, section 3, with linear networks). This is the probability of the words in their order; the multinomial
likelihood of the counts has the coefficient (sum_v c_v)! / prod_v c_v! besides, a constant that no gradient sees. The
end of the sequence counts as a word.
"""

from __future__ import annotations

import torch
from torch import nn

from vae_dist.config.model_schema import ModelConfig


class BagOfWordsEncoder(nn.Module):
    """The mean of a sequence's embeddings: its normalised counts times the embedding matrix."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.output_dim = model.embedding_dim

    def forward(self, x_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """The pooled representation, [B, E]."""
        real_BT = torch.arange(x_BTE.shape[1], device=x_BTE.device) < lengths_B[:, None]
        return x_BTE.masked_fill(~real_BT[..., None], 0).sum(1) / lengths_B[:, None].to(x_BTE.dtype)


class BagOfWordsDecoder(nn.Module):
    """Every position's hidden state is the same linear map of z, or of its own z; tokens are not read.

    There is no bias: the output projection's is one already. Without a latent it is a unigram model.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        has_latent = model.latent != "none"
        self.to_hidden = nn.Linear(model.latent_dim, model.embedding_dim, bias=False) if has_latent else None
        self.output_dim, self.first_position = model.embedding_dim, 0

    def forward(self, x_BTE: torch.Tensor, z: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, E] of z [B, D] or [B, T, D]; of `x_BTE` only the shape is used."""
        hidden = self._hidden(z)
        return (hidden[:, None] if z.dim() == 2 else hidden).expand(x_BTE.shape)

    def new_state(self, rows: int, max_tokens: int) -> list[torch.Tensor]:
        """There is no state."""
        return []

    def step(
        self, x_BE: torch.Tensor, z_BD: torch.Tensor, state: list[torch.Tensor], position_B: torch.Tensor, span: int
    ) -> torch.Tensor:
        """One token: hidden [B, E]."""
        return self._hidden(z_BD)

    def _hidden(self, z: torch.Tensor) -> torch.Tensor:
        return z.new_zeros(*z.shape[:-1], self.output_dim) if self.to_hidden is None else self.to_hidden(z)
