"""How a run begins on each rank: from nothing, or from its newest checkpoint."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist

from vae_dist.data.stream.training_data import open_training_data
from vae_dist.engine.average import WeightAverage
from vae_dist.engine.build import start_engine
from vae_dist.engine.checkpoint import CheckpointWriter, Written, load_newest
from vae_dist.engine.checkpoint_store import open_store
from vae_dist.engine.controllers import Controllers
from vae_dist.engine.ledger import Ledger
from vae_dist.engine.mfu import mfu_of_rate
from vae_dist.engine.plan import RunPlan
from vae_dist.engine.run import TrainingRun
from vae_dist.engine.step import TrainStep
from vae_dist.engine.stragglers import Stragglers
from vae_dist.engine.watchdog import Watchdog, hang_message
from vae_dist.engine.window import MetricsWindow
from vae_dist.engine.zero import optimizer_state_elements
from vae_dist.model.vae import count_parameters
from vae_dist.observe.activity import Activity
from vae_dist.observe.metrics import MetricsWriter
from vae_dist.observe.wall_time import WallTime
from vae_kernels import resolve_backend


def start_run(plan: RunPlan, device: torch.device) -> TrainingRun:
    """Build model and engine, load the newest checkpoint, open the stream. Collective."""
    config, rank, world_size = plan.config, dist.get_rank(), dist.get_world_size()
    data = open_training_data(plan.data_dirs, config, workers=world_size)
    engine, notes = start_engine(config, data.datasets[0].tokenizer, device)
    decay = config.optimizer.average_decay
    average = WeightAverage(engine.module, decay) if decay else None
    controllers = Controllers(config, plan.total_steps)
    store = open_store(config.run, plan.run_dir, plan.result_hash)
    if rank == 0:
        store.prepare()
    loaded = load_newest(engine, store, plan.run_dir / "checkpoints", average)
    controllers.load(loaded.progress.controllers)
    notes = [*loaded.passed_over, *(notes if loaded.progress.step == 0 else [])]
    activity = Activity(plan.run_dir, rank, device, config.run.trace_steps or (0, -1), config.run.trace_profiler)
    activity.step = loaded.progress.step
    wall_time = WallTime(plan.run_dir if rank == 0 else None, activity, plan.started_at)
    ranks: list[Any] = [None] * world_size
    dist.all_gather_object(ranks, (socket.gethostname(), os.getpid(), optimizer_state_elements(engine)))
    hosts = [host for host, _, _ in ranks]
    hang = hang_message(plan.run_dir) if rank == 0 else None
    notes += [hang] if hang else []
    metrics = _open_metrics(plan, engine, loaded.progress.step, notes, ranks) if rank == 0 else None
    train_step = TrainStep(engine, config, plan.total_steps, controllers, average, activity)
    train_step.skip_rule.load(loaded.progress.controllers.get("skip", {}))
    return TrainingRun(
        plan=plan,
        engine=engine,
        train_step=train_step,
        controllers=controllers,
        average=average,
        data=data,
        stream=data.stream(rank, world_size),
        window=MetricsWindow(loaded.progress.tokens_seen),
        metrics=metrics,
        writer=CheckpointWriter(store, lambda written: _tell(metrics, plan, written)),
        ledger=Ledger(plan.run_dir, rank, world_size) if config.run.ledger else None,
        activity=activity,
        wall_time=wall_time,
        watchdog=_start_watchdog(plan, wall_time, hosts),
        stragglers=Stragglers(hosts, config.run.straggler_factor),
        mfu_of_rate=mfu_of_rate(config, data, device) if rank == 0 else None,
        step=loaded.progress.step,
    )


def _start_watchdog(plan: RunPlan, wall_time: WallTime, hosts: list[str]) -> Watchdog | None:
    seconds = plan.config.run.hang_seconds
    if seconds is None:
        return None
    return Watchdog(plan.run_dir, dist.get_rank(), hosts, wall_time.activity, seconds, lambda: wall_time.is_training)


def _open_metrics(
    plan: RunPlan, engine: Any, step: int, notes: list[str], ranks: list[tuple[str, int, int]]
) -> MetricsWriter:
    """Say how the run begins, and what DeepSpeed made of the model on each rank (host, process, elements)."""
    metrics = MetricsWriter(plan.run_dir, step, plan.config.run.sinks)
    for note in notes:
        metrics.write("event", step, {"message": note})
    stage = engine.zero_optimization_stage()
    facts = {
        "optimizer": type(engine.optimizer).__name__,
        "zero_stage": stage,
        "parameters": count_parameters(engine.module),
        "optimizer_elements_per_rank": [elements for _, _, elements in ranks],
        "processes": [f"{host}:{process}" for host, process, _ in ranks],
        "precision": "bf16" if engine.module.autocast else "fp32",
        "kernels": resolve_backend(plan.config.train.kernels, engine.module.vae.output_bias),
    }
    where = f"resuming from step {step}" if step else "starting"
    message = (
        f"{where}: {facts['parameters']:,} parameters, {len(ranks)} workers, ZeRO-{stage}, {facts['precision']}, "
        f"{facts['kernels']} kernels"
    )
    metrics.write("event", step, {"message": message, **facts})
    return metrics


def _tell(metrics: MetricsWriter | None, plan: RunPlan, written: Written) -> None:
    """Say what became of a checkpoint."""
    if metrics is None:
        return
    name = str(written.path.relative_to(plan.run_dir))
    if written.problem:
        message = f"{name} could not be written, training goes on and tries again at the next one: {written.problem}"
        metrics.write("event", written.step, {"message": message})
        return
    values = {"path": name, "blocked_seconds": written.blocked_seconds, "seconds": written.seconds}
    metrics.write("checkpoint", written.step, values)
