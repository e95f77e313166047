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
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("GPU", "CPU"))
    workers = config.cluster.workers or _default_workers(gpus, cpus, config.data.streams)
    problem = worker_problem(workers, config.data.streams)
    if problem:
        raise ConfigError(problem)
    largest = max(int(node.get("CPU", 0)) for node in nodes)
    wanted = [config.cluster.cpus_per_worker] if config.cluster.cpus_per_worker else range(max(1, largest), 0, -1)
    fitting = next((c for c in wanted if _capacity(nodes, c, bool(gpus)) >= workers), None)
    if fitting is None:
        each = f"{config.cluster.cpus_per_worker or 1} CPUs" + (" and a GPU" if gpus else "")
        raise MachineError(
            f"{workers} workers with {each} each do not fit on the Ray cluster, which has {cpus} CPUs and {gpus} GPUs "
            f"on {len(nodes)} nodes: room for {_capacity(nodes, list(wanted)[-1], bool(gpus))}. Lower "
            "cluster.workers or cluster.cpus_per_worker, or add nodes."
        )
    return WorkerGroup(workers, fitting, bool(gpus))


def _capacity(nodes: list[dict[str, float]], cpus_per_worker: int, use_gpu: bool) -> int:
    """Workers that fit, counted node by node: a worker cannot span two."""
    fits = [int(node.get("CPU", 0)) // cpus_per_worker for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    return sum(min(pair) for pair in zip(fits, gpus, strict=True)) if use_gpu else sum(fits)


def _default_workers(gpus: int, cpus: int, streams: int) -> int:
    """One per GPU, or two on CPUs; at most what divides the streams."""
    wanted = gpus or min(_DEFAULT_CPU_WORKERS, max(1, cpus))
    return max(d for d in range(1, wanted + 1) if streams % d == 0)
