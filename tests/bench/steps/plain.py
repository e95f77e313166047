"""The training loop that a user of PyTorch would write: shuffled padded batches, nn.LSTM or a Transformer block,
F.cross_entropy over all logits, AdamW; in fp32 or under bf16 autocast, compiled or not.

Same model and same loss as ours, from the same weights (`gate.py` compares the losses); AdamW with a user's settings.

Shapes: B sequences, T positions, E embedding, W width, N heads, D latent, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from vae_dist.config.model_schema import LstmConfig, ModelConfig, TransformerConfig

PAD, BOS = 0, 1
_ROTARY_BASE = 10_000.0


class LstmVae(nn.Module):
    """Bowman et al. 2016 with z in the state and in every input, embeddings tied to the output."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        assert isinstance(config.encoder, LstmConfig) and isinstance(config.decoder, LstmConfig)
        embedding_dim, hidden_dim, latent_dim = config.embedding_dim, config.encoder.hidden_dim, config.latent_dim
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.encoder = nn.LSTM(embedding_dim, hidden_dim, batch_first=True)
        self.to_posterior = nn.Linear(hidden_dim, 2 * latent_dim)
        self.to_input = nn.Linear(latent_dim, embedding_dim, bias=False)
        self.to_cell = nn.Linear(latent_dim, hidden_dim)
        self.decoder = nn.LSTM(embedding_dim, hidden_dim, batch_first=True)
        self.to_embedding = nn.Linear(hidden_dim, embedding_dim, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))

    def encode(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance, [B, D]."""
        states_BTH, _ = self.encoder(self.embedding(tokens_BT))
        last_BH = states_BTH[torch.arange(len(lengths_B)), lengths_B - 1]
        mean_BD, logvar_BD = self.to_posterior(last_BH).chunk(2, dim=-1)
        return mean_BD, logvar_BD

    def decode(self, tokens_BT: torch.Tensor, z_BD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V]."""
        x_BTE = self.embedding(F.pad(tokens_BT[:, :-1], (1, 0), value=BOS)) + self.to_input(z_BD)[:, None]
        cell = self.to_cell(z_BD)[None]
        hidden_BTH, _ = self.decoder(x_BTE, (cell.tanh(), cell))
        return F.linear(self.to_embedding(hidden_BTH), self.embedding.weight, self.output_bias)

    def forward(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, noise_BD: torch.Tensor) -> torch.Tensor:
        """-ELBO, the mean over the sequences."""
        return negative_elbo(self, tokens_BT, lengths_B, noise_BD)


class Block(nn.Module):
    """RMSNorm, rotary attention, RMSNorm, SwiGLU."""

    def __init__(self, part: TransformerConfig) -> None:
        super().__init__()
        width, self.num_heads = part.hidden_dim, part.num_heads
        inner = -(-int(width * part.mlp_ratio) // 32) * 32
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTW: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        """The new residual stream."""
        heads = self.qkv(self.attention_norm(x_BTW)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, attn_mask=mask, is_causal=is_causal)
        x_BTW = x_BTW + self.attention_out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x_BTW)).chunk(2, dim=-1)
        return x_BTW + self.down(F.silu(gate) * up)


class Stack(nn.Module):
    """Input projection, blocks, final norm."""

    def __init__(self, part: TransformerConfig, embedding_dim: int) -> None:
        super().__init__()
        self.input = nn.Linear(embedding_dim, part.hidden_dim, bias=False)
        self.blocks = nn.ModuleList(Block(part) for _ in range(part.num_layers))
        self.norm = nn.RMSNorm(part.hidden_dim)

    def run(self, x_BTW: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        """The last layer, normalised."""
        for block in self.blocks:
            x_BTW = block(x_BTW, mask, is_causal)
        return self.norm(x_BTW)


class TransformerVae(nn.Module):
    """Mean of the encoder's last layer to z; z as a prefix and in every input of a causal decoder."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        assert isinstance(config.encoder, TransformerConfig) and isinstance(config.decoder, TransformerConfig)
        width, latent_dim = config.decoder.hidden_dim, config.latent_dim
        self.embedding = nn.Embedding(vocab_size, config.embedding_dim)
        self.encoder = Stack(config.encoder, config.embedding_dim)
        self.to_posterior = nn.Linear(config.encoder.hidden_dim, 2 * latent_dim)
        self.decoder = Stack(config.decoder, config.embedding_dim)
        self.to_input = nn.Linear(latent_dim, config.embedding_dim, bias=False)
        self.to_prefix = nn.Linear(latent_dim, width)
        self.to_embedding = nn.Linear(width, config.embedding_dim, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))

    def encode(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance, [B, D]."""
        real_BT = tokens_BT != PAD
        states_BTW = self.encoder.run(
            self.encoder.input(self.embedding(tokens_BT)), real_BT[:, None, None, :], is_causal=False
        )
        pooled_BW = (states_BTW * real_BT[..., None]).sum(1) / lengths_B[:, None]
        mean_BD, logvar_BD = self.to_posterior(pooled_BW).chunk(2, dim=-1)
        return mean_BD, logvar_BD

    def decode(self, tokens_BT: torch.Tensor, z_BD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V]."""
        x_BTE = self.embedding(F.pad(tokens_BT[:, :-1], (1, 0), value=BOS)) + self.to_input(z_BD)[:, None]
        x_BTW = torch.cat([self.to_prefix(z_BD)[:, None], self.decoder.input(x_BTE)], dim=1)
        hidden_BTW = self.decoder.run(x_BTW, None, is_causal=True)[:, 1:]
        return F.linear(self.to_embedding(hidden_BTW), self.embedding.weight, self.output_bias)

    def forward(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, noise_BD: torch.Tensor) -> torch.Tensor:
        """-ELBO, the mean over the sequences."""
        return negative_elbo(self, tokens_BT, lengths_B, noise_BD)


def _rotate(x_BNTK: torch.Tensor) -> torch.Tensor:
    half = x_BNTK.shape[-1] // 2
    frequency_K = _ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32) / half)
    angle_TK = torch.arange(x_BNTK.shape[2], dtype=torch.float32)[:, None] * frequency_K
    cos_TK, sin_TK = angle_TK.cos(), angle_TK.sin()
    first, second = x_BNTK.float().split(half, dim=-1)
    turned = torch.cat([first * cos_TK - second * sin_TK, second * cos_TK + first * sin_TK], dim=-1)
    return turned.to(x_BNTK.dtype)


def negative_elbo(
    model: LstmVae | TransformerVae, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, noise_BD: torch.Tensor
) -> torch.Tensor:
    """Nats per sequence, with the closed-form KL to N(0, I)."""
    mean_BD, logvar_BD = model.encode(tokens_BT, lengths_B)
    logits_BTV = model.decode(tokens_BT, mean_BD + noise_BD * torch.exp(0.5 * logvar_BD))
    rec = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), ignore_index=PAD, reduction="sum")
    mean_BD, logvar_BD = mean_BD.float(), logvar_BD.float()
    kl = 0.5 * (mean_BD.square() + logvar_BD.exp() - logvar_BD - 1.0).sum()
    return (rec + kl) / len(tokens_BT)


def plain_model(config: ModelConfig, vocab_size: int) -> LstmVae | TransformerVae:
    """The model of a configuration, freshly initialised."""
    return (LstmVae if isinstance(config.decoder, LstmConfig) else TransformerVae)(config, vocab_size)


class PlainLoop:
    """Epochs of shuffled padded batches, step by step.

    Attributes:
        dtype: of autocast, or None for fp32.
    """

    def __init__(
        self,
        model: LstmVae | TransformerVae,
        sequences: list[np.ndarray],
        batch_sequences: int,
        dtype: torch.dtype | None,
        *,
        learning_rate: float,
        is_compiled: bool = False,
    ) -> None:
        self.model, self.dtype = model, dtype
        self._forward = torch.compile(model, dynamic=True) if is_compiled else model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._latent_dim = model.to_input.in_features
        self._batches = self._endless(sequences, batch_sequences)

    def step(self) -> int:
        """One update; the real tokens of its batch."""
        tokens_BT, lengths_B = next(self._batches)
        noise_BD = torch.randn(len(lengths_B), self._latent_dim)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            loss = self._forward(tokens_BT, lengths_B, noise_BD)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return int(lengths_B.sum())

    @staticmethod
    def _endless(sequences: list[np.ndarray], batch_sequences: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        tensors, shuffled = [torch.from_numpy(s.astype(np.int64)) for s in sequences], np.random.default_rng(0)
        while True:
            order = shuffled.permutation(len(tensors))
            for first in range(0, len(order) - batch_sequences + 1, batch_sequences):
                chosen = [tensors[i] for i in order[first : first + batch_sequences]]
                lengths_B = torch.tensor([len(s) for s in chosen])
                yield pad_sequence(chosen, batch_first=True, padding_value=PAD), lengths_B
