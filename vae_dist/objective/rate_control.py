"""Controllers that hold the KL at a rate by its weight. They need the KL of each step, and keep a few floats.

`weight` is what the next step multiplies its KL with; `update` takes the KL of a step, the mean over the real
sequences of the global batch in nats, so that all ranks hold the same numbers. In an autoencoder phase the KL has no
weight, and a controller is neither asked nor told.
"""

from __future__ import annotations

import math

from vae_dist.config.objective_schema import MdrControl, ObjectiveConfig, PidControl

_RMSPROP_DECAY, _RMSPROP_EPSILON = 0.99, 1e-8


class ControlVae:
    """PI control of beta (ControlVAE, Shao et al. 2020).

    With the error e = nats - KL, after each step

        beta = beta_min + kp / (1 + exp(e)) - ki * (sum of e),   clipped to [beta_min, beta_max].

    The sum is held while beta is clipped and e would push it further out. The authors' code means to hold it whenever
    the beta before was out of bounds (by a condition, beta < 0 and beta > 1, that is never true); where the sum alone
    has passed a bound that would leave beta there for good.
    """

    def __init__(self, config: PidControl, beta_max: float) -> None:
        self._config, self._beta_max = config, beta_max
        self._integral, self._weight = 0.0, config.beta_min

    def weight(self, beta: float) -> float:
        """The controller's own beta; the annealing's is not used."""
        return self._weight

    def update(self, kl_per_seq: float) -> None:
        """Take in the KL of a step, nats per sequence."""
        low, high, error = self._config.beta_min, self._beta_max, self._config.nats - kl_per_seq
        # 1 / (1 + exp(error)), by tanh, which does not overflow.
        proportional = self._config.kp * 0.5 * (1.0 - math.tanh(0.5 * error))
        integral = self._integral - self._config.ki * error
        wanted = low + proportional + integral
        self._weight = min(max(wanted, low), high)
        outwards = (wanted > high and error < 0) or (wanted < low and error > 0)
        if not outwards:
            self._integral = integral

    def state(self) -> dict[str, float]:
        """Fit for JSON."""
        return {"integral": self._integral, "weight": self._weight}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a `state`."""
        self._integral, self._weight = state["integral"], state["weight"]


class MinimumDesiredRate:
    """A Lagrange multiplier u >= 0 for the constraint KL >= r (MDR, Pelsmaeker and Aziz 2020).

    The weights minimise and u maximises -ELBO + u (r - KL): the KL's weight is beta - u, below 0 where the KL must be
    drawn up, and after each step u rises along r - KL by RMSprop. Where the KL is at least r by itself u falls to 0.
    """

    def __init__(self, config: MdrControl) -> None:
        self._config = config
        self._multiplier, self._mean_square = 0.0, 0.0

    def weight(self, beta: float) -> float:
        """beta of the schedule less the multiplier."""
        return beta - self._multiplier

    def update(self, kl_per_seq: float) -> None:
        """Take in the KL of a step, nats per sequence."""
        slope = self._config.nats - kl_per_seq
        self._mean_square = _RMSPROP_DECAY * self._mean_square + (1.0 - _RMSPROP_DECAY) * slope * slope
        rise = self._config.learning_rate * slope / (math.sqrt(self._mean_square) + _RMSPROP_EPSILON)
        self._multiplier = max(0.0, self._multiplier + rise)

    def state(self) -> dict[str, float]:
        """Fit for JSON."""
        return {"multiplier": self._multiplier, "mean_square": self._mean_square}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a `state`."""
        self._multiplier, self._mean_square = state["multiplier"], state["mean_square"]


def rate_controller(objective: ObjectiveConfig) -> ControlVae | MinimumDesiredRate | None:
    """The controller that the configuration asks for; capacity control follows from the step and needs none."""
    if isinstance(objective.rate_control, PidControl):
        return ControlVae(objective.rate_control, objective.beta)
    return MinimumDesiredRate(objective.rate_control) if isinstance(objective.rate_control, MdrControl) else None
