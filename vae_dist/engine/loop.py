"""The training loop: fetch, forward/backward, log, validate, save. One loop for every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vae_dist.engine.plan import RunPlan
from vae_dist.engine.run import TrainingRun
from vae_dist.engine.start import start_run
from vae_dist.engine.zero import full_weights
from vae_dist.evaluate.likelihood import Scores
from vae_dist.objective.schedule import phases
from vae_dist.observe.start_up import StartUp


@dataclass(frozen=True)
class Trained:
    """What training leaves on every rank, and where the loop ended.

    Attributes:
        weights: whole float32 weights and buffers by the engine's names, those that are exported.
        exported_step: the step that the weights are of.
        valid: scores of the whole validation split, on rank 0 of a finished run that has one.
    """

    weights: dict[str, torch.Tensor]
    steps: int
    exported_step: int
    tokens_seen: int
    finished: bool
    valid: Scores | None


def train(
    plan: RunPlan, device: torch.device, should_stop: Callable[[], bool], start_up: StartUp | None = None
) -> Trained:
    """Train from the newest checkpoint to the last step, or until a rank is told to stop."""
    run = start_run(plan, device)
    start_up = start_up or StartUp(plan.started_at)
    start_up.mark("model and DeepSpeed")
    later_phases = {phase.first_step for phase in phases(plan.total_steps, plan.config.objective)[1:]}
    first_step = run.step
    stopped, plateau = False, run.controllers.plateau
    last_step = run.step if plateau and plateau.is_over else plan.total_steps
    for share in run.wall_time.waiting_for(run.stream.shares(run.step, last_step)):
        batches, stopped = run.train_step.batches(share, should_stop())
        if stopped:
            with run.wall_time.part("checkpoint"):
                run.save()
            break
        if run.step in later_phases:
            run.begin_phase()
        run.activity.before_step()
        run.window.add(run.train_step(run.step, batches, share.real_sequences))
        if run.ledger:
            run.ledger.write(run.step, share)
        run.step += 1
        run.activity.step = run.step
        if run.step == first_step + 1:
            run.begun(start_up)
        if _is_over(run):
            break
    with run.wall_time.part("checkpoint"):
        run.finish_writing()
    with run.wall_time.part("evaluation"):
        trained = _finish(run, finished=not stopped)
    run.wall_time.close(stopped_on_request=stopped)
    run.activity.close()
    if run.watchdog:
        run.watchdog.close()
    if run.metrics:
        run.metrics.write("time", run.step, run.wall_time.values())
        run.metrics.close()
    run.engine.destroy()
    return trained


def _is_over(run: TrainingRun) -> bool:
    """What is due after a step: log, validate, save; whether validation ended the run."""
    plan, over = run.plan, False
    last = run.step == plan.total_steps
    if last or run.step % plan.config.run.log_every_steps == 0:
        run.log()
    if "valid" in run.dataset.splits and (last or run.step % plan.evaluate_every == 0):
        with run.wall_time.part("evaluation"):
            over = run.validate()
    if last or over or run.step % plan.checkpoint_every == 0:
        with run.wall_time.part("checkpoint"):
            run.save()
    return over


def _finish(run: TrainingRun, finished: bool) -> Trained:
    """Choose the weights to export, and with all ranks still there fit the sampling prior and score validation."""
    config, valid, exported_step = run.config, None, run.step
    if finished:
        if config.evaluate.select == "best" and "valid" in run.dataset.splits:
            run.load_best()
            exported_step = run.controllers.best_step
        if config.model.sampling_components:
            run.fit_sampling_prior()
        if "valid" in run.dataset.splits:
            valid = run.score("valid", importance_samples=config.evaluate.importance_samples)
    weights = full_weights(run.engine)
    if run.average:
        weights |= {name: value.float().cpu() for name, value in run.average.values.items()}
    return Trained(weights, run.step, exported_step, run.window.tokens_seen, finished, valid)
