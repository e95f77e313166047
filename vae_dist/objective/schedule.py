"""Schedules: pure functions of the step, so that a resumed run needs no state to follow them."""

from __future__ import annotations

import math

from vae_dist.config.schema import ObjectiveConfig, OptimizerConfig


def beta_at(step: int, total_steps: int, config: ObjectiveConfig) -> float:
    """Weight of the KL at `step` (from 0): linear from beta_start to beta, then constant (Bowman et al. 2016)."""
    warmup = round(config.beta_warmup_fraction * total_steps)
    share = 1.0 if step >= warmup else step / warmup
    return config.beta_start + (config.beta - config.beta_start) * share


def learning_rate_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of the update made at `step` (from 0): linear warm-up, then half a cosine.

    The first update uses learning_rate / warmup_steps, the last one the cosine's end.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, total_steps - 1 - config.warmup_steps)
    share = min(1.0, (step - config.warmup_steps) / span)
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share)))
