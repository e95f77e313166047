"""Transformer encoder and decoder: RMSNorm before each part, rotary positions, SwiGLU, SDPA.

Shapes: B sequences, T positions, E embedding, W width, N heads, K head size, D latent.

Sources: RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020),
latent as a memory slot and added to embeddings (Optimus, Li et al. 2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vae_dist.config.schema import TransformerConfig

_ROTARY_BASE = 10_000.0
KeyValues = list[tuple[torch.Tensor, torch.Tensor]]


def rotate(x_BNTK: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to queries or keys, in fp32 or wider; the halves of a head are paired."""
    half = x_BNTK.shape[-1] // 2
    frequency_K = _ROTARY_BASE ** (-torch.arange(half, device=x_BNTK.device, dtype=torch.float32) / half)
    angle_TK = position_T.float()[:, None] * frequency_K
    cos_TK, sin_TK = angle_TK.cos(), angle_TK.sin()
    wide = torch.promote_types(x_BNTK.dtype, torch.float32)
    first, second = x_BNTK.to(wide).split(half, dim=-1)
    turned = torch.cat([first * cos_TK - second * sin_TK, second * cos_TK + first * sin_TK], dim=-1)
    return turned.to(x_BNTK.dtype)


class Block(nn.Module):
    """Attention and SwiGLU, each on a normalised input and added to the residual stream."""

    def __init__(self, config: TransformerConfig, dropout: float) -> None:
        super().__init__()
        width, self.num_heads, self.dropout = config.hidden_dim, config.num_heads, dropout
        inner = -(-int(width * config.mlp_ratio) // 32) * 32
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(
        self,
        x_BTW: torch.Tensor,
        position_T: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        cache: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The new residual stream and the keys and values seen so far ([B, N, T_seen, K] each)."""
        heads = self.qkv(self.attention_norm(x_BTW)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(q, position_T), rotate(k, position_T)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=drop)
        x_BTW = x_BTW + F.dropout(self.attention_out(y.transpose(1, 2).flatten(2)), drop)
        gate, up = self.gate_up(self.mlp_norm(x_BTW)).chunk(2, dim=-1)
        return x_BTW + F.dropout(self.down(F.silu(gate) * up), drop), (k, v)


class _Stack(nn.Module):
    """Input projection, blocks, final norm; recomputes blocks in backward when asked to."""

    def __init__(self, config: TransformerConfig, embedding_dim: int, dropout: float, recompute: bool) -> None:
        super().__init__()
        self.input = nn.Linear(embedding_dim, config.hidden_dim, bias=False)
        self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_dim)
        self.output_dim, self.num_heads = config.hidden_dim, config.num_heads
        self.recompute = recompute

    def run(self, x_BTW: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        position_T = torch.arange(x_BTW.shape[1], device=x_BTW.device)
        for block in self.blocks:
            if self.recompute and self.training:
                x_BTW = checkpoint(block, x_BTW, position_T, mask, is_causal, use_reentrant=False)[0]
            else:
                x_BTW = block(x_BTW, position_T, mask, is_causal)[0]
        return self.norm(x_BTW)


class TransformerEncoder(_Stack):
    """Embeddings to one vector a sequence: the mean of the last layer over real positions."""

    def forward(self, x_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """The pooled representation, [B, W]."""
        real_BT = torch.arange(x_BTE.shape[1], device=x_BTE.device) < lengths_B[:, None]
        y_BTW = self.run(self.input(x_BTE), real_BT[:, None, None, :], is_causal=False)
        return (y_BTW * real_BT[..., None]).sum(1) / lengths_B[:, None].to(y_BTW.dtype)


class TransformerDecoder(_Stack):
    """Causal Transformer conditioned on z.

    `embedding`: a projection of z is added to every input embedding. `memory`: z is projected to one prefix
    position that every token attends to.
    """

    def __init__(
        self,
        config: TransformerConfig,
        embedding_dim: int,
        latent_dim: int,
        injection: str,
        dropout: float,
        recompute: bool,
    ) -> None:
        super().__init__(config, embedding_dim, dropout, recompute)
        self.to_input = nn.Linear(latent_dim, embedding_dim, bias=False) if injection != "memory" else None
        self.to_prefix = nn.Linear(latent_dim, config.hidden_dim) if injection != "embedding" else None

    def forward(self, x_BTE: torch.Tensor, z_BD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Hidden states under teacher forcing, [B, T, W]; causal, so padding at the end needs no mask."""
        x_BTW = self.input(self._with_latent(x_BTE, z_BD))
        if self.to_prefix is None:
            return self.run(x_BTW, None, is_causal=True)
        x_BTW = torch.cat([self.to_prefix(z_BD)[:, None].to(x_BTW.dtype), x_BTW], dim=1)
        return self.run(x_BTW, None, is_causal=True)[:, 1:]

    def start(self, z_BD: torch.Tensor, max_tokens: int) -> KeyValues:
        """Keys and values before the first token: of the prefix, or empty."""
        if self.to_prefix is None:
            shape = (z_BD.shape[0], self.num_heads, 0, self.output_dim // self.num_heads)
            return [(z_BD.new_zeros(shape), z_BD.new_zeros(shape)) for _ in self.blocks]
        state: KeyValues = []
        x_B1W, position = self.to_prefix(z_BD)[:, None], z_BD.new_zeros(1)
        for block in self.blocks:
            x_B1W, seen = block(x_B1W, position, None, False)
            state.append(seen)
        return state

    def step(
        self, x_BE: torch.Tensor, z_BD: torch.Tensor, state: KeyValues, position: int
    ) -> tuple[torch.Tensor, KeyValues]:
        """One token (its position counted from 0): hidden [B, W] and the grown keys and values."""
        x_B1W = self.input(self._with_latent(x_BE[:, None], z_BD))
        offset = position + (0 if self.to_prefix is None else 1)
        position_1 = torch.full((1,), offset, device=x_BE.device)
        grown: KeyValues = []
        for block, cache in zip(self.blocks, state, strict=True):
            x_B1W, seen = block(x_B1W, position_1, None, False, cache)
            grown.append(seen)
        return self.norm(x_B1W)[:, 0], grown

    def _with_latent(self, x_BTE: torch.Tensor, z_BD: torch.Tensor) -> torch.Tensor:
        return x_BTE if self.to_input is None else x_BTE + self.to_input(z_BD)[:, None]
