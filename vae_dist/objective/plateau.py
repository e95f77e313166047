"""The learning rate cut where validation stops improving (the recipe of He et al. 2019)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vae_dist.config.objective_schema import PlateauConfig


@dataclass
class _State:
    best: float | None = None
    validations: int = 0
    waited: int = 0
    reductions: int = 0
    over: bool = False


class Plateau:
    """Counts validations that are no better than the best one.

    At `patience` of them in a row it reduces the learning rate, whereupon the run goes back to the best weights and
    the count begins again; at the plateau after `max_reductions` it stops the run. Validations are numbered from 0:
    those before `first_validation` are counted but never end in a reduction. What has to be beaten stays the best one
    ever, the one whose weights are gone back to; the paper's code lowers the bar to the last one.
    """

    def __init__(self, config: PlateauConfig) -> None:
        self._config, self._state = config, _State()

    @property
    def factor(self) -> float:
        """What the schedule's learning rate is multiplied with."""
        return self._config.factor**self._state.reductions

    @property
    def is_over(self) -> bool:
        """Whether the last validation ended the run: one that is resumed then has no step to make."""
        return self._state.over

    def after_validation(self, elbo_per_seq: float) -> Literal["improved", "waiting", "reduce", "stop"]:
        """Take in a validation, nats, higher is better; what the run has to do."""
        state, number = self._state, self._state.validations
        state.validations += 1
        if state.best is None or elbo_per_seq > state.best:
            state.best, state.waited = elbo_per_seq, 0
            return "improved"
        state.waited += 1
        if state.waited < self._config.patience or number < self._config.first_validation:
            return "waiting"
        if state.reductions == self._config.max_reductions:
            state.over = True
            return "stop"
        state.waited, state.reductions = 0, state.reductions + 1
        return "reduce"

    def state(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self._state)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._state = _State(**state)
