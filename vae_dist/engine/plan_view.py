"""A plan as text: what will be trained, for how long, and the schedules drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vae_dist.config.load import dump_yaml
from vae_dist.data.stream.training_data import TrainingData
from vae_dist.engine.plan import RunPlan
from vae_dist.model.vae import TextVAE, count_parameters
from vae_dist.objective.schedule import beta_at, learning_rate_at
from vae_dist.observe.console import say

_WIDTH, _LEVELS = 60, " .:-=+*#%@"


def describe_plan(plan: RunPlan, data: TrainingData) -> dict[str, Any]:
    """Print the plan for people; returns its numbers."""
    import torch

    config = plan.config
    # On the meta device a model of any size costs no memory.
    with torch.device("meta"):
        parameters = count_parameters(TextVAE(config.model, data.datasets[0].tokenizer.vocab_size))
    numbers = {
        "run_dir": str(plan.run_dir),
        "data_dir": ", ".join(plan.data_dirs),
        "parameters": parameters,
        "steps": plan.total_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "sequences_per_step": config.train.batch_sequences,
        "tokens_per_step": data.tokens_per_step,
        "tokens": data.tokens_per_step * plan.total_steps,
        "evaluate_every": plan.evaluate_every,
        "checkpoint_every": plan.checkpoint_every,
    }
    say(dump_yaml(config))
    for name, value in numbers.items():
        say(f"{name:<20} {value:,.0f}" if isinstance(value, int | float) else f"{name:<20} {value}")
    steps = plan.total_steps
    say(f"beta                 |{draw_schedule(lambda s: beta_at(s, steps, config.objective), steps)}|")
    say(f"learning rate        |{draw_schedule(lambda s: learning_rate_at(s, steps, config.optimizer), steps)}|")
    return numbers


def draw_schedule(value_at: Callable[[int], float], total_steps: int) -> str:
    """One line of characters, darker for larger values, over the run's steps."""
    values = [value_at(round(i * (total_steps - 1) / (_WIDTH - 1))) for i in range(_WIDTH)]
    top = max(values) or 1.0
    return "".join(_LEVELS[round(v / top * (len(_LEVELS) - 1))] for v in values)
