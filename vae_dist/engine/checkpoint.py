"""Saving and loading a run's state through DeepSpeed: any ZeRO stage and world size loads any checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from vae_dist.engine.average import WeightAverage
from vae_dist.engine.checkpoint_files import (
    FORMAT_VERSION,
    Progress,
    choose,
    commit,
    file_entry,
    read_progress,
    read_states,
    retain,
)
from vae_dist.engine.zero import load_state, named_state


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    directory: Path,
    progress: Progress,
    keep: int,
    average: WeightAverage | None = None,
) -> Path:
    """Write the state after `progress.step` updates and keep the newest `keep` checkpoints. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    target = directory / f"step-{progress.step:08d}"
    if rank == 0:
        # A half-written one of the same step is this run's own, from before it was interrupted.
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    dist.barrier()
    mine: dict[str, torch.Tensor] = {}
    for number, state in enumerate(named_state(engine)):
        if number % world == rank:
            mine[state.name] = state.weight.clone()
            mine |= {f"{state.name}::{slot}": value.clone() for slot, value in state.slots.items()}
            if average and state.name in average.values:
                mine[f"{state.name}::average"] = average.values[state.name].float().cpu()
    file = target / f"state-{rank:05d}-of-{world:05d}.safetensors"
    save_file(mine, file)
    entries: list[Any] = [None] * world
    dist.all_gather_object(entries, file_entry(file))
    if rank == 0:
        commit(target, {"format_version": FORMAT_VERSION, **progress._asdict()}, entries)
        retain(directory, keep)
    dist.barrier()
    return target


class Loaded(NamedTuple):
    """What a run starts from, and a sentence on each damaged checkpoint that was passed over."""

    progress: Progress
    passed_over: list[str]


def load_newest(engine: deepspeed.DeepSpeedEngine, directory: Path, average: WeightAverage | None = None) -> Loaded:
    """Load the newest whole checkpoint; its progress is zero when there is none. Collective.

    Rank 0 chooses and tells the others, so that all load the same one.
    """
    told: list[Any] = [None, []]
    if dist.get_rank() == 0:
        found, passed_over = choose(directory)
        told = [found.name if found else None, passed_over]
    dist.broadcast_object_list(told, src=0)
    name, passed_over = told
    if name is None:
        return Loaded(Progress(0, 0, {}), passed_over)
    progress, states = read_progress(directory / name), read_states(directory / name)
    load_state(engine, states)
    if average:
        for key, value in average.values.items():
            value.copy_(states[key].slots["average"])
        average.updates = progress.controllers["average_updates"]
    return Loaded(progress, passed_over)
