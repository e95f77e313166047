"""Transformer encoder and decoder: RMSNorm before each part, rotary positions, SwiGLU, SDPA.

Shapes: B sequences, T positions, S places of a cache, E embedding, W width, N heads, K head size, D latent.

Sources: RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020), latent as a
memory slot and added to embeddings (Optimus, Li et al. 2020, section 3.2), latent as the memory of a cross-attention
(the Transformer VAE of Texar, Hu et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vae_dist.config.model_schema import ModelConfig, TransformerConfig

_ROTARY_BASE = 10_000.0
# Longest sequence for which attention in half precision on the CPU is two products.
LONGEST_IN_PRODUCTS = 256
KeyValue = tuple[torch.Tensor, torch.Tensor]
Rotation = tuple[torch.Tensor, torch.Tensor]
# The tokens' queries, keys and values, [B, N, T, K] each, to what attention makes of them.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rotation(position: torch.Tensor, head_size: int) -> Rotation:
    """Cosine and sine of the rotary angles, float32 [..., K / 2]."""
    half = head_size // 2
    frequency_K = _ROTARY_BASE ** (-torch.arange(half, device=position.device, dtype=torch.float32) / half)
    angle = position.float()[..., None] * frequency_K
    return angle.cos(), angle.sin()


def rotate(x_BNTK: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Apply rotary positions to queries and keys, in fp32 or wider; the halves of a head are paired."""
    cos, sin = by
    wide = torch.promote_types(x_BNTK.dtype, torch.float32)
    first, second = x_BNTK.to(wide).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_BNTK.dtype)


def attention(
    q_BNTK: torch.Tensor,
    k_BNSK: torch.Tensor,
    v_BNSK: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    dropout: float,
) -> torch.Tensor:
    """softmax(q k / sqrt(K)) v: torch's fused attention, or its two products where that is slow.

    In half precision on the CPU the fused backward pass takes five times as long at 22 positions, twice at 128, and as
    long at 512 (tests/bench/NOTES.md). Scores are float32 for the softmax.
    """
    is_short = max(q_BNTK.shape[2], k_BNSK.shape[2]) <= LONGEST_IN_PRODUCTS
    if q_BNTK.device.type != "cpu" or q_BNTK.dtype != torch.bfloat16 or not is_short:
        return F.scaled_dot_product_attention(
            q_BNTK, k_BNSK, v_BNSK, attn_mask=mask, is_causal=is_causal, dropout_p=dropout
        )
    score_BNTS = torch.matmul(q_BNTK, k_BNSK.transpose(-1, -2)).float() * q_BNTK.shape[-1] ** -0.5
    if is_causal:
        mask = torch.ones(score_BNTS.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        score_BNTS = score_BNTS.masked_fill(~mask, -torch.inf)
    return torch.matmul(F.dropout(score_BNTS.softmax(-1), dropout).to(v_BNSK.dtype), v_BNSK)


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
        turn: Rotation,
        attend: Attend,
        cross_B1W: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The new residual stream.

        Args:
            x_BTW: the residual stream.
            turn: the rotation of its tokens' positions.
            attend: the attention, given rotated queries and keys.
            cross_B1W: what a cross-attention adds between the two parts.
        """
        heads = self.qkv(self.attention_norm(x_BTW)).unflatten(-1, (3, self.num_heads, -1))
        heads = heads.permute(2, 0, 3, 1, 4)
        q, k = rotate(heads[:2], turn).unbind(0)
        drop = self.dropout if self.training else 0.0
        y_BTW = attend(q, k, heads[2]).transpose(1, 2).flatten(2)
        x_BTW = x_BTW + F.dropout(self.attention_out(y_BTW), drop)
        if cross_B1W is not None:
            x_BTW = x_BTW + F.dropout(cross_B1W.expand_as(x_BTW), drop)
        gate, up = self.gate_up(self.mlp_norm(x_BTW)).chunk(2, dim=-1)
        return x_BTW + F.dropout(self.down(F.silu(gate) * up), drop)


class _Stack(nn.Module):
    """Input projection, blocks, final norm; recomputes blocks in backward when asked to."""

    def __init__(self, part: TransformerConfig, model: ModelConfig, recompute: bool) -> None:
        super().__init__()
        self.input = nn.Linear(model.embedding_dim, part.hidden_dim, bias=False)
        self.blocks = nn.ModuleList(Block(part, model.dropout) for _ in range(part.num_layers))
        self.norm = nn.RMSNorm(part.hidden_dim)
        self.output_dim, self.num_heads = part.hidden_dim, part.num_heads
        self.head_size = part.hidden_dim // part.num_heads
        self.recompute, self.dropout = recompute, model.dropout

    def run(
        self,
        x_BTW: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        slots: list[KeyValue] | None = None,
        cross: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The last layer, normalised.

        Args:
            x_BTW: the input.
            mask: broadcast to [B, N, T, T], true where a query attends.
            is_causal: a token attends to itself and the tokens before it.
            slots: keys and values of each layer that come first.
            cross: what a cross-attention adds in each layer.
        """
        turn = rotation(torch.arange(x_BTW.shape[1], device=x_BTW.device), self.head_size)
        none = [None] * len(self.blocks)
        for block, slot, cross_B1W in zip(self.blocks, slots or none, cross or none, strict=True):
            attend = partial(_attend, mask=mask, is_causal=is_causal, drop=self._drop, slot=slot)
            arguments = (x_BTW, turn, attend, cross_B1W)
            if self.recompute and self.training:
                x_BTW = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BTW = block(*arguments)
        return self.norm(x_BTW)

    @property
    def _drop(self) -> float:
        return self.dropout if self.training else 0.0


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    is_causal: bool,
    drop: float,
    slot: KeyValue | None,
) -> torch.Tensor:
    """Attention among the tokens, and to the slot before them."""
    count = q.shape[2]
    if slot is not None:
        k, v = torch.cat([slot[0], k], dim=2), torch.cat([slot[1], v], dim=2)
        # A causal mask begins at the first query and the first key: an empty query stands where the slot's was,
        # so that the mask is the plain square one, which every fused attention has.
        q = F.pad(q, (0, 0, slot[0].shape[2], 0)) if is_causal else q
    return attention(q, k, v, mask, is_causal, drop)[:, :, -count:]


def _attend_at(
    q_BN1K: torch.Tensor,
    k_BN1K: torch.Tensor,
    v_BN1K: torch.Tensor,
    *,
    keys_BNSK: torch.Tensor,
    values_BNSK: torch.Tensor,
    place_B: torch.Tensor,
    span: int,
) -> torch.Tensor:
    """Attention of one token a row to what its row has seen, itself included; its key and value are written first.

    By hand: for single queries torch's CPU kernel takes eight times as long in bf16.
    """
    row_B = torch.arange(len(place_B), device=place_B.device)
    keys_BNSK[row_B, :, place_B], values_BNSK[row_B, :, place_B] = k_BN1K[:, :, 0], v_BN1K[:, :, 0]
    unseen_BS = torch.arange(span, device=place_B.device) > place_B[:, None]
    score_BN1S = (q_BN1K * q_BN1K.shape[-1] ** -0.5) @ keys_BNSK[:, :, :span].transpose(-1, -2)
    wide = torch.promote_types(score_BN1S.dtype, torch.float32)
    share_BN1S = score_BN1S.to(wide).masked_fill(unseen_BS[:, None, None], -torch.inf).softmax(-1)
    return share_BN1S.to(v_BN1K.dtype) @ values_BNSK[:, :, :span]


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
        self.first_position = -1 if in_prefix else 0
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

    def new_state(self, rows: int, max_tokens: int) -> list[torch.Tensor]:
        """Keys and values of every layer in turn, [rows, N, S, K]: S places, one for what stands before the tokens."""
        shape = (rows, self.num_heads, max_tokens + self._before, self.head_size)
        return [self.input.weight.new_zeros(shape) for _ in range(2 * len(self.blocks))]

    def step(
        self, x_BE: torch.Tensor, z_BD: torch.Tensor, state: list[torch.Tensor], position_B: torch.Tensor, span: int
    ) -> torch.Tensor:
        """One token, or the prefix, of every row: hidden [B, W]."""
        x_B1W = self.input(self._with_latent(x_BE[:, None], z_BD))
        if self.to_prefix is not None:
            x_B1W = torch.where(position_B[:, None, None] < 0, self.to_prefix(z_BD)[:, None].to(x_B1W.dtype), x_B1W)
        place_B, pairs = position_B + self._before, list(zip(state[::2], state[1::2], strict=True))
        for pair, slot in zip(pairs, self._slots(z_BD) or [], strict=False):
            # What z is at place 0 is the same at every step.
            pair[0][:, :, :1], pair[1][:, :, :1] = slot
        # A prefix is turned as the first of the tokens, a slot not at all.
        turned_B = position_B if self.to_prefix is None else place_B
        cos_BK, sin_BK = rotation(turned_B, self.head_size)
        turn = cos_BK[:, None, None], sin_BK[:, None, None]
        cross: Sequence[torch.Tensor | None] = self._cross(z_BD) or [None] * len(self.blocks)
        for block, (keys, values), cross_B1W in zip(self.blocks, pairs, cross, strict=True):
            attend = partial(_attend_at, keys_BNSK=keys, values_BNSK=values, place_B=place_B, span=span + self._before)
            x_B1W = block(x_B1W, turn, attend, cross_B1W)
        return self.norm(x_B1W)[:, 0]

    @property
    def _before(self) -> int:
        """Places before the first token's."""
        return int(self.to_prefix is not None or self.to_slots is not None)

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
