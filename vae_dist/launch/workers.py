"""A group of workers: an actor a rank, with the environment that torch and DeepSpeed expect and a process group.

What Ray Train would be asked for here is this much; why it is not asked says CONTRIBUTING. Everything belongs to the
driver's job: when the driver is gone, so are the workers and their places.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vae_dist.errors import VaeDistError
from vae_dist.launch.cluster import WorkerGroup, all_places
from vae_dist.launch.network import use_node_interface
from vae_dist.observe.console import say

# What the other ranks get to say why one of them failed: the first to fall is not always the one that tripped.
_EXPLAIN_SECONDS = 5.0
_ROOM_SECONDS = 20.0


class WorkersFailedError(Exception):
    """Why workers ended that should not have; `causes` has the errors of their code and of Ray, the first one first."""

    def __init__(self, causes: list[BaseException]) -> None:
        super().__init__(str(causes[0]))
        self.causes = causes


class Rank(NamedTuple):
    """Where a worker stands.

    Attributes:
        gpus: ids of the GPUs of all the group's workers on this node, by local rank; none where they compute on CPUs.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    gpus: list[str]


def run_workers(
    group: WorkerGroup, environment: dict[str, str], timeout_seconds: float, function: Callable[..., Any], settings: Any
) -> Any:
    """Call `function(rank, settings)` on every worker and return what rank 0 returns; then the workers are ended.

    Args:
        environment: variables that are set before anything is imported.
        timeout_seconds: of a collective.

    Raises:
        WorkersFailedError: one of them raised or died; the others were ended.
    """
    places = _reserve(group)
    try:
        actor = TrainWorker.options(  # type: ignore[attr-defined]
            num_cpus=group.cpus_per_worker,
            num_gpus=int(group.use_gpu),
            scheduling_strategy=PlacementGroupSchedulingStrategy(places),
            runtime_env={"env_vars": environment},
        )
        workers = [actor.remote() for _ in range(group.workers)]
        ranks = number(_all([worker.node.remote() for worker in workers]))
        by_rank = {rank.rank: worker for rank, worker in zip(ranks, workers, strict=True)}
        (address,) = _all([by_rank[0].address.remote()])
        calls = [by_rank[r.rank].run.remote(r, address, timeout_seconds, function, settings) for r in sorted(ranks)]
        return _all(calls)[0]
    finally:
        # Kills what is in it.
        remove_placement_group(places)


def _reserve(group: WorkerGroup) -> PlacementGroup:
    """Places for all workers at once: two runs that each had half of theirs would wait for ever."""
    bundle = {"CPU": float(group.cpus_per_worker), **({"GPU": 1.0} if group.use_gpu else {})}
    places = placement_group([bundle] * group.workers, strategy="PACK")
    try:
        while not places.wait(_ROOM_SECONDS):
            if all_places(group) < group.workers:
                raise WorkersFailedError([RuntimeError("A node was lost while workers waited for their places.")])
            each = f"{group.cpus_per_worker} CPUs{' and a GPU' if group.use_gpu else ''}"
            say(f"waiting for others on the cluster to leave room for {group.workers} workers with {each} each")
    except BaseException:
        remove_placement_group(places)
        raise
    return places


def number(workers: Sequence[tuple[str, list[str]]]) -> list[Rank]:
    """The rank of each worker, given its node and the ids of its GPUs; neighbouring ranks share a node."""
    nodes = list(dict.fromkeys(node for node, _ in workers))
    there = {node: [i for i, (other, _) in enumerate(workers) if other == node] for node in nodes}
    order = [i for node in nodes for i in there[node]]
    ranks = []
    for i, (node, _) in enumerate(workers):
        gpus = [gpu for j in there[node] for gpu in workers[j][1]]
        local = there[node].index(i)
        ranks.append(Rank(order.index(i), len(workers), local, len(there[node]), nodes.index(node), gpus))
    return ranks


def _all(calls: list[Any]) -> list[Any]:
    """Their results when all are there; as soon as one fails, and it is plain why, the errors."""
    waiting, causes, until = list(calls), list[BaseException](), float("inf")
    while waiting and time.monotonic() < until and not any(map(_is_plain, causes)):
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, until - time.monotonic()) if causes else None)
        causes += filter(None, map(_error, done))
        if causes and until == float("inf"):
            until = time.monotonic() + _EXPLAIN_SECONDS
    if causes:
        raise WorkersFailedError(causes)
    results: list[Any] = ray.get(calls)
    return results


def _error(call: Any) -> BaseException | None:
    try:
        ray.get(call)
    except ray.exceptions.RayTaskError as error:
        # What was raised comes without its traceback; Ray's error has it as text.
        return error.cause if isinstance(error.cause, VaeDistError) else error
    except ray.exceptions.RayError as error:
        return error
    return None


def _is_plain(error: BaseException) -> bool:
    """Whether it needs no other to explain it: a message for the user, or the death of a worker."""
    return not isinstance(error, ray.exceptions.RayTaskError)


@ray.remote(max_restarts=0, max_task_retries=0)
class TrainWorker:
    """One rank."""

    def __init__(self) -> None:
        # Ctrl-C in a terminal reaches the workers of this machine, too; it is the driver that decides.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def node(self) -> tuple[str, list[str]]:
        """Its node, and the ids of its GPUs."""
        return ray.get_runtime_context().get_node_id(), [str(gpu) for gpu in ray.get_gpu_ids()]

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be met: its node's address and a port that is free now."""
        here = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in here else socket.AF_INET) as probe:
            probe.bind((here, 0))
            return here, probe.getsockname()[1]

    def run(
        self, rank: Rank, address: tuple[str, int], timeout_seconds: float, function: Callable[..., Any], settings: Any
    ) -> Any:
        """Join the process group and call the function."""
        host, port = address
        os.environ |= {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "RANK": str(rank.rank),
            "WORLD_SIZE": str(rank.world_size),
            "LOCAL_RANK": str(rank.local_rank),
            "LOCAL_WORLD_SIZE": str(rank.local_world_size),
            "NODE_RANK": str(rank.node_rank),
        }
        if rank.gpus:
            # Ranks of a node must see each other's devices to copy from one to the other.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(rank.gpus)
        use_node_interface()
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if rank.gpus else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        result = function(rank, settings)
        dist.destroy_process_group()
        return result
