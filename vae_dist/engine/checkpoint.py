"""Saving and loading a run's state through DeepSpeed: any ZeRO stage and world size loads any checkpoint.

Training waits for a snapshot in host memory alone; a thread of each rank writes it.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from vae_dist.engine.average import WeightAverage
from vae_dist.engine.checkpoint_files import (
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    Progress,
    States,
    commit,
    file_entry,
    read_progress,
)
from vae_dist.engine.checkpoint_store import CheckpointStore, choose, retain
from vae_dist.engine.zero import load_state, named_state
from vae_dist.errors import CheckpointError, DataError

# Ranks that finish writing wait so long for the slowest one: longer than a store is asked for a file.
_SLOWEST_WRITE = timedelta(hours=2)


class Written(NamedTuple):
    """What became of a checkpoint; the same on every rank.

    Attributes:
        blocked_seconds: how long training stood still for it.
        seconds: from then to the commit.
        problem: why it was not written, or None.
    """

    step: int
    path: Path
    blocked_seconds: float
    seconds: float
    problem: str | None


class CheckpointWriter:
    """Writes checkpoints while training goes on, in the order in which they were taken.

    The manifest is written when every rank's file is there. Ranks learn of it over connections of their own, so
    that nothing here meets the collectives of the steps; a rank that dies leaves a checkpoint without a manifest.
    """

    def __init__(self, store: CheckpointStore, on_written: Callable[[Written], None]) -> None:
        """Collective. `on_written` is called in the writing thread."""
        self.store = store
        self._group = dist.new_group(backend="gloo", timeout=_SLOWEST_WRITE)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: deque[Future[Written]] = deque()
        self._on_written = on_written

    def save(
        self,
        engine: deepspeed.DeepSpeedEngine,
        directory: Path,
        progress: Progress,
        keep: int,
        average: WeightAverage | None = None,
    ) -> list[Written]:
        """Snapshot the state after `progress.step` updates and have it written; `keep` checkpoints stay. Collective.

        Waits while two snapshots are in memory; returns what became of earlier ones.
        """
        began = time.monotonic()
        earlier = self.wait(under_way=1)
        tensors = _snapshot(engine, average)
        blocked = time.monotonic() - began
        self._under_way.append(self._thread.submit(self._write, tensors, directory, progress, keep, blocked))
        return earlier

    def wait(self, under_way: int = 0) -> list[Written]:
        """What became of all but the newest `under_way` checkpoints, each told once; the same on every rank."""
        over = max(0, len(self._under_way) - under_way)
        return [self._under_way.popleft().result() for _ in range(over)]

    def _write(
        self,
        tensors: dict[str, torch.Tensor],
        directory: Path,
        progress: Progress,
        keep: int,
        blocked: float,
    ) -> Written:
        began = time.monotonic()
        rank, world, store = dist.get_rank(), dist.get_world_size(), self.store
        target = directory / f"step-{progress.step:08d}"
        file = target / f"state-{rank:05d}-of-{world:05d}.safetensors"
        entry, problem = _try(lambda: _write_file(tensors, file, store))
        found: list[Any] = [None] * world
        dist.all_gather_object(found, (entry, problem), group=self._group)
        problem = next((problem for _, problem in found if problem), None)
        if rank == 0:
            state = {"format_version": FORMAT_VERSION, **progress._asdict()}
            if problem is None:
                _, problem = _try(lambda: _commit(target, state, [entry for entry, _ in found], store))
            # What is half written takes room that the next try needs.
            is_whole = problem is None
            _, unkept = _try(lambda: retain(store, directory, keep, target) if is_whole else store.discard(target))
            problem = problem or unkept
        told = [problem]
        dist.broadcast_object_list(told, src=0, group=self._group)
        store.written(target)
        written = Written(progress.step, target, blocked, time.monotonic() - began, told[0])
        self._on_written(written)
        return written


def _snapshot(engine: deepspeed.DeepSpeedEngine, average: WeightAverage | None) -> dict[str, torch.Tensor]:
    """This rank's share of the state: every world-th parameter, whole, copied to the host. Collective."""
    mine: dict[str, torch.Tensor] = {}
    for state in named_state(engine, dist.get_rank(), dist.get_world_size()):
        mine[state.name] = state.weight
        mine |= {f"{state.name}::{slot}": value for slot, value in state.slots.items()}
        if average and state.name in average.values:
            mine[f"{state.name}::average"] = average.values[state.name].float().to("cpu", copy=True)
    return mine


def _write_file(tensors: dict[str, torch.Tensor], file: Path, store: CheckpointStore) -> dict[str, Any]:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    store.put(file)
    return file_entry(file)


def _commit(target: Path, state: dict[str, Any], entries: list[dict[str, Any]], store: CheckpointStore) -> None:
    sizes = store.sizes(target, [entry["name"] for entry in entries])
    unseen = [entry["name"] for entry, size in zip(entries, sizes, strict=True) if size != entry["bytes"]]
    if unseen:
        raise CheckpointError(
            f"{', '.join(unseen)} cannot be seen where the manifest is written. Give a run.storage (or a "
            "run.checkpoint_url) that all nodes share"
        )
    commit(target, state, entries)
    store.put(target / STATE)
    store.put(target / MANIFEST)


def _try(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a thing that writes returns, or what the storage had against it, with the host that saw it."""
    try:
        return action(), None
    except (OSError, SafetensorError, DataError, CheckpointError) as error:
        return None, f"{error} (on {socket.gethostname()})"


class Loaded(NamedTuple):
    """What a run starts from, and a sentence on each damaged checkpoint that was passed over."""

    progress: Progress
    passed_over: list[str]


def load_newest(
    engine: deepspeed.DeepSpeedEngine, store: CheckpointStore, directory: Path, average: WeightAverage | None = None
) -> Loaded:
    """Load the newest whole checkpoint; its progress is zero when there is none. Collective.

    Rank 0 chooses and tells the others, so that all load the same one.

    Raises:
        CheckpointError: a rank cannot have it.
    """
    told: list[Any] = [None, []]
    if dist.get_rank() == 0:
        found, passed_over = choose(store, directory)
        told = [found.name if found else None, passed_over]
    dist.broadcast_object_list(told, src=0)
    name, passed_over = told
    if name is None:
        return Loaded(Progress(0, 0, {}), passed_over)
    path = directory / name
    # Rank 0 has read and hashed all of it; in a shared directory a thousand ranks need not do so again.
    if not store.is_shared and dist.get_rank() != 0 and (problem := store.fetch(path)):
        raise CheckpointError(f"{path} was whole a moment ago, and now {problem} (on {socket.gethostname()}).")
    progress, states = read_progress(path), States(path)
    load_state(engine, states)
    if average:
        for key, value in average.values.items():
            value.copy_(states[key].slots["average"])
        average.updates = progress.controllers["average_updates"]
    # Nobody takes it away from a rank that is still reading.
    dist.barrier()
    store.release(path)
    return Loaded(progress, passed_over)
