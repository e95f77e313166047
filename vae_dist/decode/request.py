"""What is asked of a decoder, and what it answers.

Shapes: D latent, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Decoding:
    """How a token is chosen from the decoder's distribution.

    Attributes:
        temperature: 0 (or below 1e-6) is greedy; 1 is the model's own distribution.
        top_k: keep the k likeliest tokens; 0 is off. Of equally likely ones those with the lower ids are kept.
        top_p: keep the smallest set of likeliest tokens whose mass reaches p, at least one; 1 is off. The mass is
            taken before top_k.
        max_tokens: stop after so many tokens, end of sequence included.
        allow_unknown: let the model write <unk>; by default its mass goes to the other tokens.
        repetition_penalty: above 0; the logits of tokens that the row has are divided by it where they are positive and
            multiplied where they are negative (CTRL, Keskar et al. 2019, section 4.1); 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 64
    allow_unknown: bool = False
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Request:
    """One row to decode.

    Attributes:
        z: float32 [D], or [T, D] with one for each token, of which there are then at most T.
        seed: names all random numbers of the row; not used when greedy.
        decoding: how tokens are chosen.
    """

    z: torch.Tensor
    seed: int
    decoding: Decoding

    @property
    def limit(self) -> int:
        """The most tokens that can come of it."""
        most = self.decoding.max_tokens
        return min(most, len(self.z)) if self.z.dim() == 2 else most


@dataclass(frozen=True)
class Emitted:
    """One token of a request.

    Attributes:
        handle: of the request.
        token: its id.
        log_prob: log-probability (nats) under the model's own distribution.
        finish: None while more will come; "stop" with the end of the sequence, "length" with the last token allowed.
    """

    handle: int
    token: int
    log_prob: float
    finish: FinishReason | None


@dataclass(frozen=True)
class Generated:
    """One decoded row.

    Attributes:
        tokens: ids, the end-of-sequence token included when it was reached.
        log_prob: sum of the log-probabilities (nats) under the model's own distribution.
        finished: whether the end of sequence was reached within the limit.
    """

    tokens: list[int]
    log_prob: float
    finished: bool

    @staticmethod
    def of(emitted: list[Emitted]) -> Generated:
        """A row from all that was emitted of it."""
        log_prob = sum(one.log_prob for one in emitted)
        return Generated([one.token for one in emitted], log_prob, bool(emitted) and emitted[-1].finish == "stop")
