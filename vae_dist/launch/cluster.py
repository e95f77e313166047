"""Connect to the Ray cluster this process belongs to, or start a local one; and size the worker group."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vae_dist.config.checks import worker_problem
from vae_dist.config.schema import Config
from vae_dist.errors import ConfigError, MachineError
from vae_dist.launch.access import own_token, require_token

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

    Raises:
        MachineError: the cluster is on other machines and no token is used, or others can read it.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        require_token(address)
        ray.init(log_to_driver=False)
        return
    own_token()
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
    )


def size_worker_group(config: Config, without: frozenset[str] = frozenset()) -> WorkerGroup:
    """The largest worker group, from `cluster.min_workers` to `cluster.workers`, that the cluster has room for.

    Args:
        without: ids of nodes that are not counted on.

    Raises:
        ConfigError: the number of workers does not divide the canonical streams.
        MachineError: the cluster has too few CPUs or GPUs.
    """
    there = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without]
    nodes = [node["Resources"] for node in there]
    gpus, cpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("GPU", "CPU"))
    workers = config.cluster.workers or _default_workers(gpus, cpus, config.data.streams)
    problem = worker_problem(workers, config.data.streams)
    if problem:
        raise ConfigError(problem)
    least = config.cluster.min_workers or config.cluster.workers or 1
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    wanted = [config.cluster.cpus_per_worker] if config.cluster.cpus_per_worker else range(max(1, largest), 0, -1)
    for count in range(workers, min(least, workers) - 1, -1):
        if config.data.streams % count:
            continue
        fitting = next((c for c in wanted if _capacity(nodes, c, bool(gpus)) >= count), None)
        if fitting:
            return WorkerGroup(count, fitting, bool(gpus))
    each = f"{config.cluster.cpus_per_worker or 1} CPUs" + (" and a GPU" if gpus else "")
    raise MachineError(
        f"{least} workers with {each} each do not fit on the Ray cluster, which has {cpus} CPUs and {gpus} GPUs "
        f"on {len(nodes)} nodes: room for {_capacity(nodes, list(wanted)[-1], bool(gpus))}. Lower cluster.workers "
        "(or cluster.min_workers) or cluster.cpus_per_worker, or add nodes."
    )


def all_places(group: WorkerGroup) -> int:
    """How many workers like those of `group` would fit on the cluster, were nothing else on it."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return _capacity(nodes, group.cpus_per_worker, group.use_gpu)


def free_places(group: WorkerGroup, without: frozenset[str]) -> int:
    """How many workers like those of `group` fit beside all that runs on the cluster now, other jobs included."""
    # There is no public way to ask for it by node.
    free = ray._private.state.available_resources_per_node()
    nodes = [resources for node, resources in free.items() if node not in without]
    return _capacity(nodes, group.cpus_per_worker, group.use_gpu)


def nodes_not_to_count_on(seconds: float) -> frozenset[str]:
    """Ids of nodes that are about to leave, and of those on which no task begins within `seconds`.

    Ray itself notices after half a minute that a node was cut off.
    """
    silent = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            silent[_begins.options(scheduling_strategy=there).remote()] = node["NodeID"]
    ray.wait(list(silent), num_returns=len(silent), timeout=seconds)
    answered, _ = ray.wait(list(silent), num_returns=len(silent), timeout=0)
    return leaving_nodes() | {node for task, node in silent.items() if task not in answered}


def leaving_nodes() -> frozenset[str]:
    """Ids of nodes that drain: their machine was told to stop."""
    # There is no public way to ask.
    return frozenset(ray._private.state.state.get_draining_nodes())


@ray.remote(num_cpus=0, max_retries=0)
def _begins() -> None:
    """Nothing but a sign of life."""


def _capacity(nodes: list[dict[str, float]], cpus_per_worker: int, use_gpu: bool) -> int:
    """Workers that fit, counted node by node: a worker cannot span two."""
    fits = [int(node.get("CPU", 0)) // cpus_per_worker for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    return sum(min(pair) for pair in zip(fits, gpus, strict=True)) if use_gpu else sum(fits)


def _default_workers(gpus: int, cpus: int, streams: int) -> int:
    """One per GPU, or two on CPUs; at most what divides the streams."""
    wanted = gpus or min(_DEFAULT_CPU_WORKERS, max(1, cpus))
    return max(d for d in range(1, wanted + 1) if streams % d == 0)
