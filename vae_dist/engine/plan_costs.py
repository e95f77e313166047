"""What a planned run costs on some device: from plan, data and the command's flags to a forecast, printed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vae_dist.data.stream.training_data import TrainingData
from vae_dist.engine.plan import RunPlan
from vae_dist.estimate.devices import GPUS, Device, device_named, local_gpu
from vae_dist.estimate.forecast import Assumptions, Forecast, Workload, forecast, nearest_fitting
from vae_dist.estimate.goodput import MTBF_HOURS
from vae_dist.estimate.view import as_json, lines
from vae_dist.model.precision import autocast_dtype
from vae_dist.observe.console import say


@dataclass(frozen=True)
class Question:
    """What the command was asked; None: not said.

    Attributes:
        device: a name of `estimate/devices.py`; None: what this machine has.
        interconnect, storage: bytes a second.
        mfu, price, restart_seconds, mtbf_hours: see `estimate/forecast.py`.
    """

    device: str | None = None
    mfu: float | None = None
    interconnect: float | None = None
    storage: float = 2e9
    restart_seconds: float = 120.0
    mtbf_hours: float = MTBF_HOURS
    price: float | None = None


def describe_costs(plan: RunPlan, data: TrainingData, question: Question) -> tuple[dict[str, Any], str | None]:
    """Print the estimates; returns their numbers, and in words what to change where the run does not fit.

    The numbers are those of `estimate.view.as_json`, and `fitting`: overrides of the nearest configuration that fits,
    null where there is none or none is needed.

    Raises:
        ConfigError: no such device, or workers that cannot share the streams.
    """
    found = _forecast(plan, data, question)
    for line in lines(found):
        say(line)
    if found.fits:
        say(f"It fits: {_room(found)}.")
        return as_json(found) | {"fitting": None}, None
    nearest = nearest_fitting(found)
    if nearest is None:
        problem = "Nothing that leaves the model as it is makes it fit: make the model or the longest sequence smaller."
        return as_json(found) | {"fitting": None}, f"It does not fit: {_room(found)}. {problem}"
    changes, other = nearest
    overrides = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
    problem = f"The nearest configuration that does: {overrides} ({_room(other)})."
    return as_json(found) | {"fitting": changes}, f"It does not fit: {_room(found)}. {problem}"


def _forecast(plan: RunPlan, data: TrainingData, question: Question) -> Forecast:
    config = plan.config
    name = question.device or _local_device()
    workers = config.cluster.workers or _default_workers(name, config.data.streams)
    device = _with_interconnect(device_named(name, workers), question.interconnect)
    auto_on_gpu = device.is_gpu and config.train.precision == "auto"
    autocast = torch.bfloat16 if auto_on_gpu else autocast_dtype(config.train.precision, torch.device("cpu"))
    workload = Workload(
        vocab_size=data.datasets[0].tokenizer.vocab_size,
        mean_tokens=data.tokens_per_step / config.train.batch_sequences,
        max_tokens=data.max_tokens,
        steps=plan.total_steps,
        checkpoint_every=plan.checkpoint_every,
    )
    assumptions = Assumptions(
        workers=workers,
        autocast=autocast,
        mfu=question.mfu,
        storage_bandwidth=question.storage,
        restart_seconds=question.restart_seconds,
        mtbf_hours=question.mtbf_hours,
        price=question.price,
    )
    return forecast(config, workload, device, assumptions)


def _local_device() -> str:
    """The GPU of this machine if the table has it, else its processors."""
    gpu = local_gpu()
    return gpu.name if gpu else "cpu"


def _default_workers(device: str, streams: int) -> int:
    """A node of GPUs, or two workers on processors, as the launcher has them; at most what divides the streams."""
    wanted = GPUS[device].per_node if device in GPUS else 2
    return max(n for n in range(1, wanted + 1) if streams % n == 0)


def _with_interconnect(device: Device, bandwidth: float | None) -> Device:
    return device if bandwidth is None else replace(device, link_bandwidth=bandwidth, network_bandwidth=bandwidth)


def _room(found: Forecast) -> str:
    total, memory = found.memory[found.stage].total / 1e9, found.device.memory_bytes / 1e9
    return f"{total:.3g} GB at ZeRO-{found.stage} of a device's {memory:.3g} GB"
