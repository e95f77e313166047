"""A plan as text: what will be trained, for how long, and the schedules drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vae_dist.config.credentials import without_credentials
from vae_dist.config.load import dump_yaml
from vae_dist.config.objective_schema import CapacityControl, MdrControl, OptimizerConfig, PidControl
from vae_dist.config.schema import Config
from vae_dist.data.stream.training_data import TrainingData
from vae_dist.engine.plan import RunPlan
from vae_dist.model.vae import TextVAE, count_parameters
from vae_dist.objective.schedule import beta_at, capacity_at, is_autoencoder, learning_rate_at, phases
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
        "data_dir": without_credentials(", ".join(plan.data_dirs)),
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
    for line in schedule_lines(config, plan.total_steps):
        say(line)
    return numbers


def schedule_lines(config: Config, total_steps: int) -> Iterator[str]:
    """The run's schedules, one a line: drawn where they follow from the step, in words where a controller sets them."""
    objective, optimizer = config.objective, config.optimizer
    if len(phases(total_steps, objective)) > 1:
        yield _line("phases", f"|{_draw_phases(config, total_steps)}|")
    if config.model.latent != "none":
        yield from _kl_lines(config, total_steps)
    rate = draw_schedule(lambda s: learning_rate_at(s, total_steps, optimizer, objective), total_steps)
    yield _line("learning rate", f"|{rate}| {_peak_of_learning_rate(optimizer)}")


def _kl_lines(config: Config, total_steps: int) -> Iterator[str]:
    objective, control, aggressive = config.objective, config.objective.rate_control, config.objective.aggressive
    if isinstance(control, PidControl):
        first = "0 in the autoencoder phase, then " if objective.autoencoder_fraction else ""
        bounds = f"between {control.beta_min:g} and {objective.beta:g}"
        yield _line("beta", f"{first}held by ControlVAE {bounds} so that the KL is {control.nats:g} nats")
    else:
        drawing = draw_schedule(lambda s: beta_at(s, total_steps, objective), total_steps)
        yield _line("beta", f"|{drawing}| to {objective.beta:g}")
    if isinstance(control, MdrControl):
        words = f"beta less a multiplier (MDR) that draws the KL up to {control.nats:g} nats where it is below"
        yield _line("weight of the KL", words)
    if isinstance(control, CapacityControl):
        drawing = draw_schedule(lambda s: capacity_at(s, total_steps, objective), total_steps)
        yield _line("capacity", f"|{drawing}| to {control.nats:g} nats")
    if aggressive:
        yield _line(
            "aggressive encoder",
            f"up to {aggressive.max_encoder_steps} steps of its own before each of the decoder, while the mutual "
            f"information grows, at most until step {round(aggressive.max_fraction * total_steps)}",
        )


def _peak_of_learning_rate(optimizer: OptimizerConfig) -> str:
    peak, plateau = f"to {optimizer.learning_rate:g}", optimizer.plateau
    if optimizer.schedule != "plateau":
        return peak
    return f"{peak}, times {plateau.factor:g} at each plateau of the validation, {plateau.max_reductions} times at most"


def _line(name: str, words: str) -> str:
    return f"{name:<20} {words}"


def _columns(total_steps: int) -> list[int]:
    """The steps that the columns of a drawing show, from the first to the last."""
    return [round(i * (total_steps - 1) / (_WIDTH - 1)) for i in range(_WIDTH)]


def _draw_phases(config: Config, total_steps: int) -> str:
    first = sum(is_autoencoder(step, total_steps, config.objective) for step in _columns(total_steps))
    names = (("<autoencoder", first), ("<variational", _WIDTH - first))
    return "".join(name[:width].ljust(width, "-") for name, width in names)


def draw_schedule(value_at: Callable[[int], float], total_steps: int) -> str:
    """One line of characters, darker for larger values, over the run's steps."""
    values = [value_at(step) for step in _columns(total_steps)]
    top = max(values) or 1.0
    return "".join(_LEVELS[round(v / top * (len(_LEVELS) - 1))] for v in values)
