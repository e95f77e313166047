"""Keeps a run going: starts workers on what the cluster has, and again when they end before the run does.

lost            a worker, or the node under it, died: they begin again from the newest checkpoint
told to leave   a node drains, because its machine is about to stop: they save and begin again elsewhere
room            nodes came back, or more were added: they save and begin again, more of them
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import ray

from vae_dist.config.schema import Config
from vae_dist.engine.lock import forget_writer
from vae_dist.engine.plan import RunPlan
from vae_dist.errors import MachineError, RunError
from vae_dist.launch.cluster import (
    WorkerGroup,
    free_places,
    leaving_nodes,
    nodes_not_to_count_on,
    size_worker_group,
)
from vae_dist.launch.stop import new_stop_flag
from vae_dist.observe.console import say
from vae_dist.observe.metrics import read_metrics

_ANSWER_SECONDS = 20.0
_ROOM_SECONDS = 2.0
_LEAVING_SECONDS = 1.0
_GROWING_SECONDS = 5.0


class WorkersLostError(RunError):
    """The workers ended, and not by an error of the run's own."""


@dataclass(frozen=True)
class Outcome:
    """`result` is the run's JSON line, or None when it was stopped at `steps`."""

    result: dict[str, Any] | None
    steps: int


class Supervisor:
    """Runs `train` with groups of workers and a flag that stops them, until it returns a result or is stopped."""

    def __init__(self, plan: RunPlan, train: Callable[[WorkerGroup, Any], Outcome]) -> None:
        self._plan, self._train = plan, train
        self._flag = new_stop_flag()
        self._stopping = False

    def stop(self) -> None:
        """Have the workers save and end; a signal handler calls it."""
        self._stopping = True
        self._flag.put_up.remote()

    def run(self, group: WorkerGroup) -> Outcome:
        """To the end of the run, beginning with this group.

        Raises:
            VaeDistError: what a worker raised for the user.
            WorkersLostError: workers were lost too often without progress.
            MachineError: they were lost, and there was no room for others in time.
            RunError: the same, and it was stopped while it waited.
        """
        lost, furthest = 0, -1
        while True:
            try:
                with _Watch(self._plan.config, group, self._flag):
                    outcome = self._train(group, self._flag)
                if outcome.result is not None or self._stopping:
                    return outcome
            except WorkersLostError as error:
                reached = self._reached()
                lost, furthest = (1, reached) if reached > furthest else (lost + 1, furthest)
                if lost > self._plan.config.cluster.max_restarts or self._stopping:
                    raise
                say(f"{error.message}\nstarting workers again ({lost} of {self._plan.config.cluster.max_restarts})")
                forget_writer(self._plan.run_dir)
            group, self._flag = self._room(), new_stop_flag()
            if self._stopping:
                # The signal came when there was nobody to be told.
                self._flag.put_up.remote()
            say(f"going on with {group.workers} workers of {group.cpus_per_worker} CPUs")

    def _room(self) -> WorkerGroup:
        """The group that the cluster has room for, as soon as it has."""
        deadline = time.monotonic() + self._plan.config.cluster.wait_seconds
        while True:
            try:
                return size_worker_group(self._plan.config, nodes_not_to_count_on(_ANSWER_SECONDS))
            except MachineError as error:
                resume = "The same command resumes the run from its newest checkpoint."
                if self._stopping:
                    raise RunError(f"Stopped while waiting for room: {error.message} {resume}") from None
                if time.monotonic() > deadline:
                    waited = f"Waited {self._plan.config.cluster.wait_seconds} s for it (cluster.wait_seconds)."
                    raise MachineError(f"{error.message} {waited} {resume}") from None
            time.sleep(_ROOM_SECONDS)

    def _reached(self) -> int:
        """The last step that was told of."""
        return max((record["step"] for record in read_metrics(self._plan.run_dir)), default=0)


class _Watch:
    """While workers train, raises their flag when a node of theirs is told to leave, or there is room for more."""

    def __init__(self, config: Config, group: WorkerGroup, flag: Any) -> None:
        self._config, self._group, self._flag = config, group, flag
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._hear()

    def _watch(self) -> None:
        had_room, looked, reason = False, time.monotonic(), None
        while reason is None and not self._over.wait(_LEAVING_SECONDS):
            leaving, nodes = leaving_nodes(), self._hear()
            if leaving & nodes:
                reason = "a node is about to leave the cluster"
            elif time.monotonic() - looked > _GROWING_SECONDS:
                looked, has_room = time.monotonic(), self._has_room(leaving)
                # Twice in a row: a node that comes and goes is not worth the restart.
                reason = "the cluster has room for more workers" if has_room and had_room else None
                had_room = has_room
        if reason:
            say(f"{reason}: saving a checkpoint at the next step, then starting workers again")
            self._flag.put_up.remote()

    def _hear(self) -> set[str]:
        """Say what workers told; the nodes that they are on."""
        nodes, told = ray.get(self._flag.news.remote())
        for message in told:
            say(message)
        return nodes

    def _has_room(self, leaving: frozenset[str]) -> bool:
        try:
            more = size_worker_group(self._config, leaving).workers - self._group.workers
        except MachineError:
            return False
        return more > 0 and free_places(self._group, leaving) >= more
