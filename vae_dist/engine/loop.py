"""The training loop: fetch, forward/backward, finite check, log, save, evaluate. One loop for every machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from vae_dist.config.schema import Config
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.stream.stream import Stream
from vae_dist.data.stream.training_data import TrainingData, open_training_data
from vae_dist.engine.checkpoint import Loaded, load_newest, save_checkpoint
from vae_dist.engine.checkpoint_files import Progress
from vae_dist.engine.plan import RunPlan
from vae_dist.engine.precision import autocast_dtype
from vae_dist.engine.step import TrainStep
from vae_dist.engine.window import MetricsWindow
from vae_dist.engine.zero import build_engine, full_weights, optimizer_state_elements, require_compiler
from vae_dist.errors import MachineError, RunError
from vae_dist.evaluate.likelihood import score_split, summarise
from vae_dist.model.vae import TextVAE, count_parameters
from vae_dist.objective.elbo import NegativeElbo
from vae_dist.objective.schedule import beta_at, learning_rate_at
from vae_dist.observe.metrics import MetricsWriter
from vae_kernels import resolve_backend


@dataclass(frozen=True)
class Trained:
    """What training leaves on every rank: whole float32 weights by the engine's names, and where the loop ended."""

    weights: dict[str, torch.Tensor]
    steps: int
    tokens_seen: int
    finished: bool


def train(plan: RunPlan, device: torch.device, should_stop: Callable[[], bool]) -> Trained:
    """Train from the newest checkpoint to the last step, or until a rank is told to stop."""
    config, world_size = plan.config, dist.get_world_size()
    data = open_training_data(plan.data_dirs, config, workers=world_size)
    dataset = data.datasets[0]
    engine = _build(config, dataset.tokenizer.vocab_size, device)
    loaded = load_newest(engine, plan.run_dir / "checkpoints")
    step, window = loaded.progress.step, MetricsWindow(loaded.progress.tokens_seen)
    metrics = _open_metrics(plan, loaded, engine)
    stream = data.stream(dist.get_rank(), world_size)
    train_step, stopped = TrainStep(engine, config, plan.total_steps), False
    for share in stream.shares(step, plan.total_steps):
        batches, stopped = train_step.batches(share, should_stop())
        if stopped:
            break
        window.add(train_step(step, batches, share.real_sequences))
        step += 1
        last = step == plan.total_steps
        if last or step % config.run.log_every_steps == 0:
            _log(metrics, plan, step, window, train_step, data, stream)
        if last or step % plan.checkpoint_every == 0:
            _save(metrics, plan, step, window, train_step)
        if "valid" in dataset.splits and (last or step % plan.evaluate_every == 0):
            _validate(metrics, plan, step, engine, dataset)
            window.skip_time()
    if stopped:
        _save(metrics, plan, step, window, train_step)
    weights = full_weights(engine)
    if metrics:
        metrics.close()
    engine.destroy()
    return Trained(weights, step, window.tokens_seen, finished=not stopped)


def _build(config: Config, vocab_size: int, device: torch.device) -> deepspeed.DeepSpeedEngine:
    _require_backend(config.train.kernels, device)
    require_compiler()
    deepspeed.init_distributed()
    torch.manual_seed(config.train.seed)
    vae = TextVAE(
        config.model,
        vocab_size,
        kernels=config.train.kernels,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    objective = NegativeElbo(
        vae, config.objective.free_bits_nats_per_dim, autocast_dtype(config.train.precision, device)
    )
    return build_engine(
        objective.to(device),
        config.optimizer,
        config.cluster.zero_stage,
        config.train.batch_sequences,
        dist.get_world_size(),
    )


def _require_backend(kernels: str, device: torch.device) -> None:
    try:
        resolve_backend(kernels, torch.empty(0, device=device))
    except RuntimeError as error:
        raise MachineError(f"train.kernels = {kernels}: {error}") from None


def _open_metrics(plan: RunPlan, loaded: Loaded, engine: Any) -> MetricsWriter | None:
    """Say how the run begins, and what DeepSpeed made of the model on each rank. Collective."""
    held: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(held, optimizer_state_elements(engine))
    if dist.get_rank() != 0:
        return None
    step = loaded.progress.step
    metrics = MetricsWriter(plan.run_dir, step)
    for note in loaded.passed_over:
        metrics.write("event", step, {"message": note})
    stage = engine.zero_optimization_stage()
    facts = {
        "optimizer": type(engine.optimizer).__name__,
        "zero_stage": stage,
        "parameters": count_parameters(engine.module),
        "optimizer_elements_per_rank": held,
        "precision": "bf16" if engine.module.autocast else "fp32",
        "kernels": resolve_backend(plan.config.train.kernels, engine.module.vae.output_bias),
    }
    where = f"resuming from step {step}" if step else "starting"
    message = (
        f"{where}: {facts['parameters']:,} parameters, {len(held)} workers, ZeRO-{stage}, {facts['precision']}, "
        f"{facts['kernels']} kernels"
    )
    metrics.write("event", step, {"message": message, **facts})
    return metrics


def _log(
    metrics: MetricsWriter | None,
    plan: RunPlan,
    step: int,
    window: MetricsWindow,
    train_step: TrainStep,
    data: TrainingData,
    stream: Stream,
) -> None:
    """Reduce the window over ranks, check that the loss is finite, write it."""
    values = window.reduce(stream.take_waited_seconds())
    _require_finite(values["elbo_per_seq"], plan, step)
    values |= {
        "beta": beta_at(step - 1, plan.total_steps, plan.config.objective),
        "learning_rate": learning_rate_at(step - 1, plan.total_steps, plan.config.optimizer),
        "grad_norm": train_step.gradient_norm(),
        "epoch": step / plan.steps_per_epoch,
        "seconds_left": (plan.total_steps - step) * values["step_seconds"],
    }
    if plan.config.data.damage == "skip":
        values["skipped_sequences"] = _sum_over_ranks(stream.skipped_sequences)
    if plan.config.data.mixture:
        values["mixture"] = data.mixture_report(step)
    if metrics:
        metrics.write("train", step, values)


def _sum_over_ranks(number: int) -> int:
    total = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)


def _save(
    metrics: MetricsWriter | None, plan: RunPlan, step: int, window: MetricsWindow, train_step: TrainStep
) -> None:
    started = time.monotonic()
    tokens_seen, loss = window.totals()
    # The loss is of the weights before the last update; the gradient's norm tells of the update itself.
    _require_finite(loss + (train_step.gradient_norm() or 0.0), plan, step)
    path = save_checkpoint(
        train_step.engine, plan.run_dir / "checkpoints", Progress(step, tokens_seen), plan.config.run.keep_checkpoints
    )
    if metrics:
        name = str(path.relative_to(plan.run_dir))
        metrics.write("checkpoint", step, {"path": name, "seconds": time.monotonic() - started})
    window.skip_time()


def _require_finite(loss: float, plan: RunPlan, step: int) -> None:
    if not math.isfinite(loss):
        raise RunError(
            f"The loss is not finite at step {step} ({loss}). The newest checkpoint in "
            f"{plan.run_dir / 'checkpoints'} is from before. Lower optimizer.learning_rate or "
            "optimizer.gradient_clip_norm and train under another run.name."
        )


def _validate(metrics: MetricsWriter | None, plan: RunPlan, step: int, engine: Any, dataset: Dataset) -> None:
    scores = score_split(
        engine.module.vae,
        dataset.split("valid"),
        seed=plan.config.train.seed,
        batch_sequences=max(1, plan.config.evaluate.batch_sequences // dist.get_world_size()),
        max_sequences=plan.config.evaluate.max_sequences,
        autocast=engine.module.autocast,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )
    if metrics and scores is not None:
        metrics.write("valid", step, summarise(scores))
