"""Aggressive training of the encoder (He et al. 2019, algorithm 1): whose turn the next step is.

A round is a number of encoder-only steps and one decoder-only step. The encoder's turn ends when the mean loss per
token of a block of `check_steps` steps is above that of the block before it in the same round, at the latest after
`max_encoder_steps`. Every step reads a new global batch; in the paper's code the decoder's step reads the round's first
batch again, and a round has one encoder step less at most.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vae_dist.config.objective_schema import AggressiveConfig


@dataclass
class _State:
    steps: int = 0
    over: bool = False
    information: float | None = None
    # Of the round.
    encoder_steps: int = 0
    encoder_done: bool = False
    block_before: float | None = None
    # Of the block.
    loss: float = 0.0
    tokens: float = 0.0


class Aggressive:
    """The state machine: asked before a step whose turn it is, told after it what it cost.

    All ranks must tell it the same numbers, sums over the global batch.
    """

    def __init__(self, config: AggressiveConfig, total_steps: int) -> None:
        self._config = config
        self._most_steps = round(config.max_fraction * total_steps)
        self._state = _State()

    @property
    def turn(self) -> Literal["encoder", "decoder", "both"]:
        """What the next step moves; both when this kind of training is over."""
        if self._state.over or self._state.steps >= self._most_steps:
            return "both"
        return "decoder" if self._state.encoder_done else "encoder"

    def after_step(self, loss_sum: float, tokens: float) -> None:
        """Take in a step: its loss in nats and its tokens, over the global batch."""
        state, turn = self._state, self.turn
        state.steps += 1
        if turn == "encoder":
            self._after_encoder_step(loss_sum, tokens)
        elif turn == "decoder":
            self._state = _State(steps=state.steps, information=state.information)

    def after_validation(self, mutual_information: float) -> None:
        """Take in I_q(x, z) on validation, nats: all is over once it fell below that of the validation before."""
        state = self._state
        if self.turn != "both":
            state.over = state.information is not None and mutual_information < state.information
            state.information = mutual_information

    def state(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self._state)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, in the middle of a round too."""
        self._state = _State(**state)

    def _after_encoder_step(self, loss_sum: float, tokens: float) -> None:
        state = self._state
        state.encoder_steps += 1
        state.loss += loss_sum
        state.tokens += tokens
        if state.encoder_steps % self._config.check_steps == 0:
            per_token = state.loss / state.tokens
            state.encoder_done = state.block_before is not None and per_token > state.block_before
            state.block_before, state.loss, state.tokens = per_token, 0.0, 0.0
        if state.encoder_steps >= self._config.max_encoder_steps:
            state.encoder_done = True
