"""Saving and loading a run's state through DeepSpeed: any ZeRO stage and world size loads any checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from vae_dist.engine.checkpoint_files import (
    Progress,
    choose,
    commit,
    file_entry,
    read_progress,
    read_states,
    retain,
)
from vae_dist.engine.zero import load_state, named_state


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, directory: Path, progress: Progress, keep: int) -> Path:
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
            mine[f"{state.name}::exp_avg"] = state.exp_avg.clone()
            mine[f"{state.name}::exp_avg_sq"] = state.exp_avg_sq.clone()
    file = target / f"state-{rank:05d}-of-{world:05d}.safetensors"
    save_file(mine, file)
    entries: list[Any] = [None] * world
    dist.all_gather_object(entries, file_entry(file))
    if rank == 0:
        commit(target, {"format_version": 1, **progress._asdict()}, entries)
        retain(directory, keep)
    dist.barrier()
    return target


class Loaded(NamedTuple):
    """What a run starts from, and a sentence on each damaged checkpoint that was passed over."""

    progress: Progress
    passed_over: list[str]


def load_newest(engine: deepspeed.DeepSpeedEngine, directory: Path) -> Loaded:
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
        return Loaded(Progress(0, 0), passed_over)
    progress = read_progress(directory / name)
    load_state(engine, read_states(directory / name), optimizer_step=progress.step)
    return Loaded(progress, passed_over)
