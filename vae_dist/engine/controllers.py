"""What steers a run by the run's own measurements. A few numbers of state, the same on every rank, in every
checkpoint: all else about a step follows from its number."""

from __future__ import annotations

import math
from typing import Any

from vae_dist.config.schema import Config
from vae_dist.objective.aggressive import Aggressive
from vae_dist.objective.plateau import Plateau
from vae_dist.objective.rate_control import rate_controller


class Controllers:
    """The controllers that the configuration asks for, and the best validation so far.

    Attributes:
        rate: holds the KL at a rate, see `objective/rate_control.py`.
        aggressive: whose turn a step is, encoder's or decoder's.
        plateau: cuts the learning rate and ends the run.
        best_elbo, best_step: the best validation, in nats per sequence.
    """

    def __init__(self, config: Config, total_steps: int) -> None:
        self.rate = rate_controller(config.objective)
        aggressive = config.objective.aggressive
        self.aggressive = Aggressive(aggressive, total_steps) if aggressive else None
        self.plateau = Plateau(config.optimizer.plateau) if config.optimizer.schedule == "plateau" else None
        self.best_elbo: float | None = None
        self.best_step = 0

    def is_new_best(self, elbo_per_seq: float, step: int) -> bool:
        """Take note of a validation; whether it is the best one."""
        # Written so that NaN is never the best.
        if not elbo_per_seq > (-math.inf if self.best_elbo is None else self.best_elbo):
            return False
        self.best_elbo, self.best_step = elbo_per_seq, step
        return True

    def state(self) -> dict[str, Any]:
        """Fit for JSON."""
        parts = {"rate": self.rate, "aggressive": self.aggressive, "plateau": self.plateau}
        states = {name: part.state() for name, part in parts.items() if part is not None}
        return states | {"best": [self.best_elbo, self.best_step]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`; an empty one is the beginning."""
        for name in ("rate", "aggressive", "plateau"):
            part = getattr(self, name)
            if part is not None and name in state:
                part.load(state[name])
        self.best_elbo, self.best_step = state.get("best", (None, 0))
