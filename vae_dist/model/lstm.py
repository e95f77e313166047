"""LSTM encoder and decoder.

Shapes: B sequences, T positions, E embedding, H hidden, D latent.

Sequences are padded at the end, so the state at a sequence's last real token never sees padding and no
packing is needed; the backward direction runs over each sequence reversed within its own length. Plain
padded batches keep torch on its fused path (oneDNN, cuDNN), and the stream's batches are homogeneous in
length, so little is computed on padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vae_dist.config.model_schema import LstmConfig, ModelConfig

LstmState = tuple[torch.Tensor, torch.Tensor]


class Lstm(nn.LSTM):
    """torch's LSTM, batch first, with DropConnect on the recurrent weights (Merity et al. 2018, section 2).

    While training, each forward pass drops entries of weight_hh once for all steps and sequences; the weights that stay
    are scaled by 1 / (1 - p). The state itself is never masked, and the fused kernels are torch's own.
    """

    def __init__(self, input_dim: int, part: LstmConfig, model: ModelConfig) -> None:
        between_layers = model.dropout if part.num_layers > 1 else 0.0
        super().__init__(input_dim, part.hidden_dim, part.num_layers, batch_first=True, dropout=between_layers)
        self.recurrent_dropout = part.recurrent_dropout

    def forward(  # type: ignore[override]
        self, x_BTE: torch.Tensor, state: LstmState | None = None
    ) -> tuple[torch.Tensor, LstmState]:
        """Hidden states [B, T, H] and the last state, (h, c), each [layers, B, H]; without a state it is zero."""
        if not (self.training and self.recurrent_dropout):
            result: tuple[torch.Tensor, LstmState] = super().forward(x_BTE, state)
            return result
        if state is None:
            zeros = x_BTE.new_zeros(self.num_layers, x_BTE.shape[0], self.hidden_size)
            state = zeros, zeros
        weights = []
        for weight_ih, weight_hh, bias_ih, bias_hh in self.all_weights:
            weights += [weight_ih, F.dropout(weight_hh, self.recurrent_dropout), bias_ih, bias_hh]
        # What nn.LSTM calls: its own forward reads its parameters, which must stay what the optimizer knows.
        y_BTH, h, c = torch.lstm(x_BTE, state, weights, True, self.num_layers, self.dropout, True, False, True)
        return y_BTH, (h, c)


class LstmEncoder(nn.Module):
    """Embeddings to the last hidden state, or to the states at every position; of both directions when bidirectional.

    The directions are stacks of their own: with several layers they meet only in the result.
    """

    def __init__(self, part: LstmConfig, model: ModelConfig) -> None:
        super().__init__()
        self.per_token = model.latent == "token"
        self.forward_lstm = Lstm(model.embedding_dim, part, model)
        self.backward_lstm = Lstm(model.embedding_dim, part, model) if model.bidirectional else None
        self.output_dim = part.hidden_dim * (2 if model.bidirectional else 1)

    def forward(self, x_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """One vector a sequence, [B, output_dim], or a token, [B, T, output_dim] (at padding: any finite number).

        A token's backward state has read the sequence from its end to this token.
        """
        last_B1 = lengths_B[:, None] - 1
        states = [self._pick(self.forward_lstm(x_BTE)[0], last_B1, None)]
        if self.backward_lstm is not None:
            reverse_BT = (last_B1 - torch.arange(x_BTE.shape[1], device=x_BTE.device)).clamp(min=0)
            reversed_BTE = _at(x_BTE, reverse_BT)
            states.append(self._pick(self.backward_lstm(reversed_BTE)[0], last_B1, reverse_BT))
        return torch.cat(states, dim=-1)

    def _pick(self, y_BTH: torch.Tensor, last_B1: torch.Tensor, order_BT: torch.Tensor | None) -> torch.Tensor:
        if not self.per_token:
            return _at(y_BTH, last_B1)[:, 0]
        return y_BTH if order_BT is None else _at(y_BTH, order_BT)


class LstmDecoder(nn.Module):
    """Autoregressive LSTM conditioned on z; without a latent an LSTM language model.

    `embedding`: a projection of z is added to every input embedding.
    `memory`: h0 = tanh(W z), c0 = W z (He et al. 2019).
    Without teacher forcing the projection of z (the same at every step, or of the token's own z) is all the input there
    is: no word is read, and words are independent given z.
    """

    def __init__(self, part: LstmConfig, model: ModelConfig) -> None:
        super().__init__()
        self.teacher_forcing = model.teacher_forcing
        self.first_position = 0
        self.lstm = Lstm(model.embedding_dim, part, model)
        has_latent = model.latent != "none"
        in_input = has_latent and (model.injection in ("embedding", "both") or not model.teacher_forcing)
        in_state = has_latent and model.injection in ("memory", "both")
        self.to_input = nn.Linear(model.latent_dim, model.embedding_dim, bias=False) if in_input else None
        self.to_cell = nn.Linear(model.latent_dim, part.num_layers * part.hidden_dim) if in_state else None
        self.output_dim = part.hidden_dim

    def forward(self, x_BTE: torch.Tensor, z: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] for z [B, D] or [B, T, D]; `lengths_B` is not needed by a causal LSTM."""
        h, c = self._start(z)
        state = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        return self.lstm(self._input(x_BTE, z), state)[0]

    def new_state(self, rows: int, max_tokens: int) -> list[torch.Tensor]:
        """h and c of `rows` sequences, [rows, layers, H]; the cells, which add up over steps, in float32 or wider."""
        shape, weight = (rows, self.lstm.num_layers, self.lstm.hidden_size), self.lstm.all_weights[0][0]
        h, c = weight.new_zeros(shape), weight.new_zeros(shape)
        return [h, c.to(torch.promote_types(c.dtype, torch.float32))]

    def step(
        self, x_BE: torch.Tensor, z_BD: torch.Tensor, state: list[torch.Tensor], position_B: torch.Tensor, span: int
    ) -> torch.Tensor:
        """One token: hidden [B, H]. nn.LSTM would arrange its weights anew at every call."""
        h_BLH, c_BLH = state
        begins_B11 = (position_B == self.first_position)[:, None, None]
        if bool(begins_B11.any()):
            for old, new in zip(state, self._start(z_BD), strict=True):
                old.copy_(torch.where(begins_B11, new, old))
        y_BH = self._input(x_BE[:, None], z_BD)[:, 0]
        for layer, (weight_ih, weight_hh, bias_ih, bias_hh) in enumerate(self.lstm.all_weights):
            gates = F.linear(y_BH, weight_ih, bias_ih) + F.linear(h_BLH[:, layer], weight_hh, bias_hh)
            into, keep, new, out = gates.to(c_BLH.dtype).chunk(4, dim=-1)
            c_BH = keep.sigmoid() * c_BLH[:, layer] + into.sigmoid() * new.tanh()
            y_BH = (out.sigmoid() * c_BH.tanh()).to(h_BLH.dtype)
            h_BLH[:, layer], c_BLH[:, layer] = y_BH, c_BH
        return y_BH

    def _start(self, z: torch.Tensor) -> LstmState:
        """State before the first token: (h0, c0), each [B, layers, H]."""
        shape = (z.shape[0], self.lstm.num_layers, self.lstm.hidden_size)
        if self.to_cell is None:
            return z.new_zeros(shape), z.new_zeros(shape)
        cell = self.to_cell(z).view(shape)
        return cell.tanh(), cell

    def _input(self, x_BTE: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if self.to_input is None:
            return x_BTE
        latent = self.to_input(z) if z.dim() == 3 else self.to_input(z)[:, None]
        return x_BTE + latent if self.teacher_forcing else latent.expand_as(x_BTE)


def _at(y_BTH: torch.Tensor, position_BP: torch.Tensor) -> torch.Tensor:
    return y_BTH.gather(1, position_BP[..., None].expand(-1, -1, y_BTH.shape[-1]))
