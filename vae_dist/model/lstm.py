"""LSTM encoder and decoder.

Shapes: B sequences, T positions, E embedding, H hidden, D latent.

Sequences are padded at the end, so the state at a sequence's last real token never sees padding and no
packing is needed; the backward direction runs over each sequence reversed within its own length. Plain
padded batches keep torch on its fused path (oneDNN, cuDNN), and the stream's batches are homogeneous in
length, so little is computed on padding.
"""

from __future__ import annotations

import torch
from torch import nn

from vae_dist.config.schema import LstmConfig

LstmState = tuple[torch.Tensor, torch.Tensor]


class LstmEncoder(nn.Module):
    """Embeddings to one vector a sequence: the last hidden state, of both directions when bidirectional.

    The directions are stacks of their own: with several layers they meet only in the result.
    """

    def __init__(self, config: LstmConfig, embedding_dim: int, bidirectional: bool, dropout: float) -> None:
        super().__init__()
        inner = dropout if config.num_layers > 1 else 0.0
        size = (embedding_dim, config.hidden_dim, config.num_layers)
        self.forward_lstm = nn.LSTM(*size, batch_first=True, dropout=inner)
        self.backward_lstm = nn.LSTM(*size, batch_first=True, dropout=inner) if bidirectional else None
        self.output_dim = config.hidden_dim * (2 if bidirectional else 1)

    def forward(self, x_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """The pooled representation, [B, output_dim]."""
        last_B11 = (lengths_B - 1)[:, None, None]
        pooled = [_at(self.forward_lstm(x_BTE)[0], last_B11)]
        if self.backward_lstm is not None:
            steps_T = torch.arange(x_BTE.shape[1], device=x_BTE.device)
            reverse_BT = (lengths_B[:, None] - 1 - steps_T).clamp(min=0)
            reversed_BTE = x_BTE.gather(1, reverse_BT[..., None].expand_as(x_BTE))
            pooled.append(_at(self.backward_lstm(reversed_BTE)[0], last_B11))
        return torch.cat(pooled, dim=-1)


class LstmDecoder(nn.Module):
    """Autoregressive LSTM conditioned on z.

    `embedding`: a projection of z is added to every input embedding.
    `memory`: h0 = tanh(W z), c0 = W z (He et al. 2019).
    """

    def __init__(self, config: LstmConfig, embedding_dim: int, latent_dim: int, injection: str, dropout: float) -> None:
        super().__init__()
        inner = dropout if config.num_layers > 1 else 0.0
        self.lstm = nn.LSTM(embedding_dim, config.hidden_dim, config.num_layers, batch_first=True, dropout=inner)
        self.to_input = nn.Linear(latent_dim, embedding_dim, bias=False) if injection != "memory" else None
        to_cell_dim = config.num_layers * config.hidden_dim
        self.to_cell = nn.Linear(latent_dim, to_cell_dim) if injection != "embedding" else None
        self.output_dim = config.hidden_dim

    def forward(self, x_BTE: torch.Tensor, z_BD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Hidden states under teacher forcing, [B, T, H]; `lengths_B` is not needed by a causal LSTM."""
        return self.lstm(self._with_latent(x_BTE, z_BD), self.start(z_BD, x_BTE.shape[1]))[0]

    def start(self, z_BD: torch.Tensor, max_tokens: int) -> LstmState:
        """State before the first token: (h0, c0), each [layers, B, H]."""
        shape = (self.lstm.num_layers, z_BD.shape[0], self.lstm.hidden_size)
        if self.to_cell is None:
            return z_BD.new_zeros(shape), z_BD.new_zeros(shape)
        cell = self.to_cell(z_BD).view(shape[1], shape[0], shape[2]).transpose(0, 1).contiguous()
        return cell.tanh(), cell

    def step(
        self, x_BE: torch.Tensor, z_BD: torch.Tensor, state: LstmState, position: int
    ) -> tuple[torch.Tensor, LstmState]:
        """One token: hidden [B, H] and the next state."""
        hidden, state = self.lstm(self._with_latent(x_BE[:, None], z_BD), state)
        return hidden[:, 0], state

    def _with_latent(self, x_BTE: torch.Tensor, z_BD: torch.Tensor) -> torch.Tensor:
        return x_BTE if self.to_input is None else x_BTE + self.to_input(z_BD)[:, None]


def _at(y_BTH: torch.Tensor, position_B11: torch.Tensor) -> torch.Tensor:
    return y_BTH.gather(1, position_B11.expand(-1, 1, y_BTH.shape[-1]))[:, 0]
