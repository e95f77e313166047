"""Transformer encoder and decoder: RMSNorm before each part, rotary positions, SwiGLU, SDPA.

Shapes: B sequences, T positions, E embedding, W width, N heads, K head size, D latent.

Sources: RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020), latent as a
memory slot and added to embeddings (Optimus, Li et al. 2020, section 3.2), latent as the memory of a cross-attention
(the Transformer VAE of Texar, Hu et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vae_dist.config.model_schema import ModelConfig, TransformerConfig

_ROTARY_BASE = 10_000.0
KeyValue = tuple[torch.Tensor, torch.Tensor]


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
        cache: KeyValue | None = None,
        cross_B1W: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, KeyValue]:
        """The new residual stream and the keys and values seen so far ([B, N, T_seen, K] each).

        Args:
            x_BTW: the residual stream.
            position_T: positions of its tokens.
            mask: broadcast to [B, N, T, T_seen], true where a query attends.
            is_causal: a token attends to `cache`, itself and the tokens before it in `x_BTW`.
            cache: keys and values that come first.
            cross_B1W: what a cross-attention adds between the two parts.
        """
        heads = self.qkv(self.attention_norm(x_BTW)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(q, position_T), rotate(k, position_T)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
            # A causal mask begins at the first query and the first key: empty queries stand where the cache's were,
            # so that the mask is the plain square one, which every fused attention has.
            q = F.pad(q, (0, 0, cache[0].shape[2], 0)) if is_causal else q
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=drop)
        y_BTW = y[:, :, -x_BTW.shape[1] :].transpose(1, 2).flatten(2)
        x_BTW = x_BTW + F.dropout(self.attention_out(y_BTW), drop)
        if cross_B1W is not None:
            x_BTW = x_BTW + F.dropout(cross_B1W.expand_as(x_BTW), drop)
        gate, up = self.gate_up(self.mlp_norm(x_BTW)).chunk(2, dim=-1)
        return x_BTW + F.dropout(self.down(F.silu(gate) * up), drop), (k, v)


class _Stack(nn.Module):
    """Input projection, blocks, final norm; recomputes blocks in backward when asked to."""

    def __init__(self, part: TransformerConfig, model: ModelConfig, recompute: bool) -> None:
        super().__init__()
        self.input = nn.Linear(model.embedding_dim, part.hidden_dim, bias=False)
        self.blocks = nn.ModuleList(Block(part, model.dropout) for _ in range(part.num_layers))
        self.norm = nn.RMSNorm(part.hidden_dim)
        self.output_dim, self.num_heads = part.hidden_dim, part.num_heads
        self.recompute = recompute

    def run(
        self,
        x_BTW: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        slots: list[KeyValue] | None = None,
        cross: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        position_T = torch.arange(x_BTW.shape[1], device=x_BTW.device)
        none = [None] * len(self.blocks)
        for block, slot, cross_B1W in zip(self.blocks, slots or none, cross or none, strict=True):
            arguments = (x_BTW, position_T, mask, is_causal, slot, cross_B1W)
            if self.recompute and self.training:
                x_BTW = checkpoint(block, *arguments, use_reentrant=False)[0]
            else:
                x_BTW = block(*arguments)[0]
        return self.norm(x_BTW)


class TransformerEncoder(_Stack):
    """Embeddings to the mean of the last layer over real positions, or to the last layer at every position."""

    def __init__(self, part: TransformerConfig, model: ModelConfig, recompute: bool) -> None:
        super().__init__(part, model, recompute)
        self.per_token = model.latent == "token"

    def forward(self, x_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """One vector a sequence, [B, W], or a token, [B, T, W] (at padding: any finite number)."""
        real_BT = torch.arange(x_BTE.shape[1], device=x_BTE.device) < lengths_B[:, None]
        y_BTW = self.run(self.input(x_BTE), real_BT[:, None, None, :], is_causal=False)
        if self.per_token:
            return y_BTW
        return (y_BTW * real_BT[..., None]).sum(1) / lengths_B[:, None].to(y_BTW.dtype)


class TransformerDecoder(_Stack):
    """Causal Transformer conditioned on z; without a latent a Transformer language model.

    `embedding`: a projection of z is added to every input embedding.
    `memory`: z is projected to one prefix position that every token attends to.
    `layers`: z is projected to one more key and value in each layer, at no position (Optimus, which has one vector for
    both; here they are two, as a token's are).
    `cross_attention`: each block has a cross-attention whose memory is z alone (Texar). A softmax over one slot is 1
    whatever the query, so its output is W_o W_v z at every position: queries and keys would get no gradient, and the
    product of the two matrices is one matrix.
    """

    def __init__(self, part: TransformerConfig, model: ModelConfig, recompute: bool) -> None:
        super().__init__(part, model, recompute)
        injection = model.injection if model.latent != "none" else None
        latent_dim, width = model.latent_dim, part.hidden_dim
        in_input, in_prefix = injection in ("embedding", "both"), injection in ("memory", "both")
        self.to_input = nn.Linear(latent_dim, model.embedding_dim, bias=False) if in_input else None
        self.to_prefix = nn.Linear(latent_dim, width) if in_prefix else None
        self.to_slots = self._for_each_block(latent_dim, 2 * width) if injection == "layers" else None
        self.to_cross = self._for_each_block(latent_dim, width) if injection == "cross_attention" else None

    def forward(self, x_BTE: torch.Tensor, z: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, W] for z [B, D] or, injected into the embeddings alone, [B, T, D].

        Causal, so padding at the end needs no mask.
        """
        x_BTW = self.input(self._with_latent(x_BTE, z))
        if self.to_prefix is not None:
            x_BTW = torch.cat([self.to_prefix(z)[:, None].to(x_BTW.dtype), x_BTW], dim=1)
        y_BTW = self.run(x_BTW, None, is_causal=True, slots=self._slots(z), cross=self._cross(z))
        return y_BTW if self.to_prefix is None else y_BTW[:, 1:]

    def start(self, z: torch.Tensor, max_tokens: int) -> list[KeyValue]:
        """Keys and values before the first token: of the prefix, of z in each layer, or empty."""
        if self.to_slots is not None:
            return self._slots(z) or []
        if self.to_prefix is None:
            shape = (z.shape[0], self.num_heads, 0, self.output_dim // self.num_heads)
            return [(z.new_zeros(shape), z.new_zeros(shape)) for _ in self.blocks]
        state: list[KeyValue] = []
        x_B1W, position = self.to_prefix(z)[:, None], z.new_zeros(1)
        for block in self.blocks:
            x_B1W, seen = block(x_B1W, position, None, False)
            state.append(seen)
        return state

    def step(
        self, x_BE: torch.Tensor, z_BD: torch.Tensor, state: list[KeyValue], position: int
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """One token (its position counted from 0): hidden [B, W] and the grown keys and values.

        `z_BD` is the position's own where each has one.
        """
        x_B1W = self.input(self._with_latent(x_BE[:, None], z_BD))
        offset = position + (0 if self.to_prefix is None else 1)
        position_1 = torch.full((1,), offset, device=x_BE.device)
        cross: Sequence[torch.Tensor | None] = self._cross(z_BD) or [None] * len(self.blocks)
        grown: list[KeyValue] = []
        for block, cache, cross_B1W in zip(self.blocks, state, cross, strict=True):
            x_B1W, seen = block(x_B1W, position_1, None, False, cache, cross_B1W)
            grown.append(seen)
        return self.norm(x_B1W)[:, 0], grown

    def _for_each_block(self, latent_dim: int, width: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(latent_dim, width, bias=False) for _ in self.blocks)

    def _with_latent(self, x_BTE: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if self.to_input is None:
            return x_BTE
        return x_BTE + (self.to_input(z) if z.dim() == 3 else self.to_input(z)[:, None])

    def _slots(self, z_BD: torch.Tensor) -> list[KeyValue] | None:
        """A key and a value of every layer, [B, N, 1, K] each."""
        if self.to_slots is None:
            return None
        heads = (project(z_BD).unflatten(-1, (2, self.num_heads, 1, -1)) for project in self.to_slots)
        return [(pair[:, 0], pair[:, 1]) for pair in heads]

    def _cross(self, z_BD: torch.Tensor) -> list[torch.Tensor] | None:
        return None if self.to_cross is None else [project(z_BD)[:, None] for project in self.to_cross]
