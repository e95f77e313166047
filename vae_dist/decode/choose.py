"""The choice of a token for every row of a step, each row in its own way.

Shapes: S rows, V vocabulary, R rows with top_k or top_p, K candidates, N blocks of the vocabulary.

A row's token is that of its uniform number: the first whose cumulative probability exceeds it, in the order of the
ids. Nothing is sorted where nothing is cut off. No number of a row depends on another row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vae_dist.data.text.special_ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from vae_dist.decode.request import Decoding

# Dividing logits by less would overflow float32; the likeliest token has all the mass there anyway.
_GREEDY_BELOW = 1e-6
_SPECIAL = 1 + max(PAD_ID, BOS_ID, EOS_ID, UNK_ID)
_BLOCK = 128
_CANDIDATES = 128


def is_greedy(decoding: Decoding) -> bool:
    """Whether the likeliest token is taken, so that no random number is needed."""
    return decoding.temperature < _GREEDY_BELOW


class Chooser:
    """Chooses for rows whose options stay the same from step to step."""

    def __init__(self, rows: Sequence[Decoding], device: torch.device) -> None:
        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=device)[:, None]

        greedy = [is_greedy(row) for row in rows]
        self._all_greedy, self._greedy_S = all(greedy), torch.tensor(greedy, device=device) if any(greedy) else None
        self._ban_SX = torch.zeros(len(rows), _SPECIAL, device=device)
        self._ban_SX[:, [PAD_ID, BOS_ID]] = -torch.inf
        self._ban_SX[:, UNK_ID] = torch.tensor([0.0 if row.allow_unknown else -torch.inf for row in rows])
        temperature = [1.0 if none else row.temperature for row, none in zip(rows, greedy, strict=True)]
        self._temperature_S1 = column(temperature) if set(temperature) != {1.0} else None
        penalty = [row.repetition_penalty for row in rows]
        self._penalty_S1 = column(penalty) if set(penalty) != {1.0} else None
        cut = [i for i, row in enumerate(rows) if not greedy[i] and (row.top_k or row.top_p < 1.0)]
        self._cut_R = torch.tensor(cut, dtype=torch.int64, device=device)
        self._top_k = [rows[i].top_k for i in cut]
        # Off, no rounding of the mass may reach it.
        self._top_p_R1 = column([rows[i].top_p if rows[i].top_p < 1.0 else 2.0 for i in cut])
        self._has_top_p = any(rows[i].top_p < 1.0 for i in cut)

    def __call__(
        self, logits_SV: torch.Tensor, uniform_S: torch.Tensor, written: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The token of each row, int64 [S], and its log-probability under the model's own distribution, float64 [S].

        Args:
            logits_SV: float32 logits of the next token; changed in place.
            uniform_S: float32 in [0, 1); of greedy rows anything.
            written: the tokens that each row has; not read where no row has a repetition penalty.
        """
        special_SX = logits_SV[:, :_SPECIAL].double()
        logits_SV[:, :_SPECIAL] += self._ban_SX
        weight_SV = torch.softmax(logits_SV, dim=-1)
        # The softmax of the likeliest is 1 / sum exp(l - max): one pass over the vocabulary serves both.
        allowed_S = logits_SV.amax(1).double() - weight_SV.amax(1).double().log()
        banned_S = special_SX.masked_fill(self._ban_SX == 0.0, -torch.inf).logsumexp(1)
        log_total_S = torch.logaddexp(allowed_S, banned_S)
        scaled_SV = self._scaled(logits_SV, written)
        if scaled_SV is not logits_SV and not self._all_greedy:
            weight_SV = torch.softmax(scaled_SV, dim=-1)
        token_S = scaled_SV.argmax(1) if self._all_greedy else self._drawn(scaled_SV, weight_SV, uniform_S)
        return token_S, logits_SV.gather(1, token_S[:, None])[:, 0].double() - log_total_S

    def _drawn(self, scaled_SV: torch.Tensor, weight_SV: torch.Tensor, uniform_S: torch.Tensor) -> torch.Tensor:
        if len(self._cut_R):
            self._cut(scaled_SV, weight_SV)
        drawn_S = at_uniform(weight_SV, uniform_S)
        return drawn_S if self._greedy_S is None else torch.where(self._greedy_S, scaled_SV.argmax(1), drawn_S)

    def _scaled(self, logits_SV: torch.Tensor, written: Sequence[Sequence[int]]) -> torch.Tensor:
        if self._penalty_S1 is not None:
            longest = max(map(len, written))
            # Padding names a token that is banned already.
            padded = [[*row, *[PAD_ID] * (longest - len(row))] for row in written]
            token_ST = torch.tensor(padded, dtype=torch.int64, device=logits_SV.device)
            old_ST = logits_SV.gather(1, token_ST)
            new_ST = torch.where(old_ST > 0, old_ST / self._penalty_S1, old_ST * self._penalty_S1)
            logits_SV = logits_SV.scatter(1, token_ST, new_ST)
        return logits_SV if self._temperature_S1 is None else logits_SV / self._temperature_S1

    def _cut(self, scaled_SV: torch.Tensor, weight_SV: torch.Tensor) -> None:
        """Take the weight of all but the likeliest tokens, in the rows that want it; in place."""
        score_RV, weight_RV = scaled_SV[self._cut_R], weight_SV[self._cut_R]
        vocabulary = score_RV.shape[1]
        top_k_R1 = torch.tensor([k or vocabulary for k in self._top_k], device=score_RV.device)[:, None]
        candidates = min(vocabulary, max([_CANDIDATES * self._has_top_p, *self._top_k]))
        while True:
            value_RK, id_RK = score_RV.topk(candidates, dim=1)
            mass_RK = weight_RV.gather(1, id_RK).double()
            # A token stays while the mass before it is below p; the likeliest stays for any p.
            kept_R1 = (mass_RK.cumsum(1) - mass_RK < self._top_p_R1).sum(1, keepdim=True).clamp(min=1)
            short_R1 = (kept_R1 == candidates) & (candidates < top_k_R1)
            if candidates == vocabulary or not bool(short_R1.any()):
                break
            candidates = vocabulary
        kept_R1 = torch.minimum(kept_R1, top_k_R1)
        border_R1 = value_RK.gather(1, kept_R1 - 1)
        above_RV, equal_RV = score_RV > border_R1, score_RV == border_R1
        missing_R1 = kept_R1 - above_RV.sum(1, keepdim=True)
        stay_RV = above_RV | (equal_RV & (equal_RV.cumsum(1) <= missing_R1))
        weight_SV[self._cut_R] = weight_RV * stay_RV


def at_uniform(weight_SV: torch.Tensor, uniform_S: torch.Tensor) -> torch.Tensor:
    """The first id of each row where the cumulative weight exceeds the uniform number's share of the whole, int64 [S].

    A weight of zero is never chosen. Blocks are summed first, and only one is looked into: a cumulative sum over
    the vocabulary would take several times as long.
    """
    vocabulary = weight_SV.shape[1]
    whole = vocabulary // _BLOCK
    body_SN = weight_SV[:, : whole * _BLOCK].reshape(len(weight_SV), whole, _BLOCK).sum(-1)
    rest_S1 = weight_SV[:, whole * _BLOCK :].sum(-1, keepdim=True)
    until_SN = torch.cat([body_SN, rest_S1], dim=1).double().cumsum(1)
    wanted_S1 = uniform_S.double()[:, None] * until_SN[:, -1:]
    block_S1 = torch.searchsorted(until_SN, wanted_S1, right=True).clamp(max=whole)
    before_S1 = torch.where(block_S1 > 0, until_SN.gather(1, (block_S1 - 1).clamp(min=0)), 0.0)
    id_SX = block_S1 * _BLOCK + torch.arange(_BLOCK, device=weight_SV.device)
    inside_SX = weight_SV.gather(1, id_SX.clamp(max=vocabulary - 1)).double().masked_fill(id_SX >= vocabulary, 0.0)
    within_SX = inside_SX.cumsum(1)
    place_S1 = torch.searchsorted(within_SX, wanted_S1 - before_S1, right=True)
    # The block was summed in float32: rounding may leave the number beyond its last token.
    last_S1 = (within_SX < within_SX[:, -1:]).sum(1, keepdim=True)
    return id_SX.clamp(max=vocabulary - 1).gather(1, torch.minimum(place_S1, last_S1))[:, 0]
