"""Schedules: pure functions of the step, so that a resumed run needs no state to follow them.

Steps count from 0. A run has one phase or, with `autoencoder_fraction`, two; annealing, capacity and learning rate
begin anew with each phase, and their fractions are of its steps. Every ramp of beta and capacity has arrived at the
last step of its phase (of its cycle), whatever its fraction rounds to. A warm-up longer than its phase ends with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from vae_dist.config.objective_schema import (
    Annealing,
    CapacityControl,
    CyclicalAnnealing,
    LinearAnnealing,
    LogisticAnnealing,
    ObjectiveConfig,
    OptimizerConfig,
)


class Phase(NamedTuple):
    """A stretch of a run that is one training of its own.

    Attributes:
        first_step: of the run.
        steps: how many.
        autoencoder: the KL has weight 0, and there are no free bits (Li et al. 2019, section 3.1).
    """

    first_step: int
    steps: int
    autoencoder: bool


def phases(total_steps: int, objective: ObjectiveConfig) -> tuple[Phase, ...]:
    """The run's phases, none without steps; a run of one step has no autoencoder phase."""
    if objective.autoencoder_fraction == 0.0:
        return (Phase(0, total_steps, False),)
    boundary = min(max(1, round(objective.autoencoder_fraction * total_steps)), total_steps - 1)
    both = (Phase(0, boundary, True), Phase(boundary, total_steps - boundary, False))
    return tuple(phase for phase in both if phase.steps)


def phase_at(step: int, total_steps: int, objective: ObjectiveConfig) -> Phase:
    """The phase that `step` belongs to; the last one beyond the end."""
    return next(phase for phase in reversed(phases(total_steps, objective)) if step >= phase.first_step)


def is_autoencoder(step: int, total_steps: int, objective: ObjectiveConfig) -> bool:
    """Whether `step` trains an autoencoder: no KL, no free bits, no rate control."""
    return phase_at(step, total_steps, objective).autoencoder


def beta_at(step: int, total_steps: int, objective: ObjectiveConfig) -> float:
    """Weight of the KL at `step` by the annealing alone; 0 in an autoencoder phase."""
    phase = phase_at(step, total_steps, objective)
    if phase.autoencoder:
        return 0.0
    return _annealed(step - phase.first_step, phase.steps, objective.beta, objective.annealing)


def capacity_at(step: int, total_steps: int, objective: ObjectiveConfig) -> float:
    """C of capacity control, nats per sequence: from 0 linearly to its end, then constant (Burgess et al. 2018)."""
    control, phase = objective.rate_control, phase_at(step, total_steps, objective)
    assert isinstance(control, CapacityControl)
    return 0.0 if phase.autoencoder else control.nats * _ramp(step - phase.first_step, phase.steps, control.ramp)


def learning_rate_at(step: int, total_steps: int, optimizer: OptimizerConfig, objective: ObjectiveConfig) -> float:
    """Learning rate of the update made at `step`: linear warm-up, then half a cosine or constant.

    The first update of a phase uses learning_rate / warmup_steps, the last one the cosine's end. With the plateau
    schedule this is what the controller's factor multiplies.
    """
    phase = phase_at(step, total_steps, objective)
    step -= phase.first_step
    if step < optimizer.warmup_steps:
        return optimizer.learning_rate * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule != "cosine":
        return optimizer.learning_rate
    span = max(1, phase.steps - 1 - optimizer.warmup_steps)
    share = min(1.0, (step - optimizer.warmup_steps) / span)
    floor = optimizer.min_learning_rate_ratio
    return optimizer.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share)))


def _annealed(step: int, steps: int, beta: float, annealing: Annealing) -> float:
    if isinstance(annealing, LinearAnnealing):
        return annealing.start + (beta - annealing.start) * _ramp(step, steps, annealing.fraction)
    if isinstance(annealing, LogisticAnnealing):
        # Of the way from the first step to the last, so that the last is t = 1.
        share = step / (steps - 1) if steps > 1 else 1.0
        return beta * _sigmoid(annealing.steepness * (share - annealing.midpoint))
    step, steps = _in_cycle(step, steps, annealing.cycles)
    wait = 0.0 if isinstance(annealing, CyclicalAnnealing) else annealing.zero
    return beta * _ramp(step, steps, annealing.ramp, wait)


def _in_cycle(step: int, steps: int, cycles: int) -> tuple[int, int]:
    """Step within its cycle, and the cycle's steps.

    Cycle c begins at floor(c steps / cycles), as in the code of Fu et al. (2019); their formula's cycles of
    ceil(steps / cycles) would leave the last one short, and end a run where the cycles do not divide it at beta 0.
    """
    cycle = min(((step + 1) * cycles - 1) // steps, cycles - 1)
    first = cycle * steps // cycles
    return step - first, max(1, (cycle + 1) * steps // cycles - first)


def _ramp(step: int, steps: int, rise: float, wait: float = 0.0) -> float:
    """0 for the share `wait` of `steps`, then linear over the share `rise`, then 1; 1 at the last step in any case."""
    last = steps - 1
    first = min(round(wait * steps), last)
    length = min(round(rise * steps), last - first)
    if step >= first + length:
        return 1.0
    return max(0, step - first) / length if length else 0.0


def _sigmoid(x: float) -> float:
    # By tanh, which does not overflow.
    return 0.5 * (1.0 + math.tanh(0.5 * x))
