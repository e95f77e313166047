"""Connect to the Ray cluster this process belongs to, or start a local one; and size the worker group."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray

from vae_dist.config.checks import worker_problem
from vae_dist.config.schema import Config
from vae_dist.errors import ConfigError, MachineError

_DEFAULT_CPU_WORKERS = 2
_LOCAL_OBJECT_STORE_BYTES = 200 * 2**20


@dataclass(frozen=True)
class WorkerGroup:
    """How many workers, and what each gets."""

    workers: int
    cpus_per_worker: int
    use_gpu: bool


def connect() -> None:
    """Attach to the cluster of RAY_ADDRESS or of the surrounding Ray job; otherwise start one on this machine.

    A cluster started here listens on loopback and uses token authentication, Ray's own default.
    """
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
    )


def size_worker_group(config: Config) -> WorkerGroup:
    """Workers for the connected cluster.

    Raises:
        ConfigError: the number of workers does not divide the canonical streams.
        MachineError: the cluster has too few CPUs or GPUs.
    """
    total = ray.cluster_resources()
    gpus, cpus = int(total.get("GPU", 0)), int(total.get("CPU", 0))
    workers = config.cluster.workers or _default_workers(gpus, cpus, config.data.streams)
    problem = worker_problem(workers, config.data.streams)
    if problem:
        raise ConfigError(problem)
    cpus_per_worker = config.cluster.cpus_per_worker or max(1, cpus // workers)
    if gpus and workers > gpus:
        raise MachineError(
            f"cluster.workers = {workers}, but the Ray cluster has {gpus} GPUs and each worker needs one. Use "
            f"cluster.workers={gpus} or fewer, or add nodes."
        )
    if workers * cpus_per_worker > cpus:
        raise MachineError(
            f"{workers} workers with {cpus_per_worker} CPUs each need {workers * cpus_per_worker} CPUs, but the Ray "
            f"cluster has {cpus}. Lower cluster.workers or cluster.cpus_per_worker, or add nodes."
        )
    return WorkerGroup(workers, cpus_per_worker, bool(gpus))


def _default_workers(gpus: int, cpus: int, streams: int) -> int:
    """One per GPU, or two on CPUs; at most what divides the streams."""
    wanted = gpus or min(_DEFAULT_CPU_WORKERS, max(1, cpus))
    return max(d for d in range(1, wanted + 1) if streams % d == 0)
