"""Checkpoints: named fp32 weights and Adam moments, loadable at any ZeRO stage and world size. No pickle.

    checkpoints/step-00000100/
      state-00000-of-00002.safetensors   weight, exp_avg, exp_avg_sq of the parameters rank 0 writes
      state.json                         step, and what the run is
      manifest.json                      size and xxh3 of every file; written last: the commit point

A directory without a valid manifest is a half-written checkpoint and is never chosen.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vae_dist.engine.zero import NamedState, load_state, named_state
from vae_dist.errors import CheckpointError

logger = logging.getLogger(__name__)
_READ_BYTES = 16 * 2**20


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, directory: Path, step: int, tokens_seen: int, keep: int) -> Path:
    """Write the state after `step` updates and delete checkpoints older than the newest `keep`. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    target = directory / f"step-{step:08d}"
    if rank == 0:
        # A half-written one of the same step is this run's own, from before it was interrupted.
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    dist.barrier()
    name = f"state-{rank:05d}-of-{world:05d}.safetensors"
    mine: dict[str, torch.Tensor] = {}
    for number, state in enumerate(named_state(engine)):
        if number % world == rank:
            mine[state.name] = state.weight.clone()
            mine[f"{state.name}::exp_avg"] = state.exp_avg.clone()
            mine[f"{state.name}::exp_avg_sq"] = state.exp_avg_sq.clone()
    save_file(mine, target / name)
    entries: list[dict[str, Any] | None] = [None] * world
    dist.all_gather_object(entries, _entry(target / name))
    if rank == 0:
        _commit(target, {"format_version": 1, "step": step, "tokens_seen": tokens_seen}, [e for e in entries if e])
        _retain(directory, keep)
    dist.barrier()
    return target


class Progress(NamedTuple):
    """How far a run has come: optimizer steps made, target tokens read over all ranks."""

    step: int
    tokens_seen: int


def load_newest(engine: deepspeed.DeepSpeedEngine, directory: Path) -> Progress:
    """Load the newest whole checkpoint; returns its progress, zero when there is none. Collective.

    Rank 0 chooses and tells the others, so that all load the same one. Damaged or half-written ones are
    passed over with a warning that names them.
    """
    chosen: list[str | None] = [None]
    if dist.get_rank() == 0:
        found = newest_whole(directory)
        chosen = [found.name if found else None]
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        return Progress(0, 0)
    path = directory / chosen[0]
    state = _read_json(path / "state.json")
    load_state(engine, _read_states(path), optimizer_step=state["step"])
    return Progress(state["step"], state["tokens_seen"])


def newest_whole(directory: Path) -> Path | None:
    """The newest checkpoint whose files match its manifest, or None."""
    if not directory.is_dir():
        return None
    for path in sorted(directory.glob("step-*"), reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("Checkpoint %s is passed over: %s.", path, problem)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None when every file matches its manifest."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return "it has no manifest.json, so it was never finished"
    try:
        entries = _read_json(manifest)["files"]
    except (ValueError, KeyError, TypeError):
        return "its manifest.json is not readable"
    for entry in entries:
        file = path / entry["name"]
        if not file.is_file():
            return f"{entry['name']} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{entry['name']} has {file.stat().st_size} bytes, not {entry['bytes']}"
        if _hash(file) != entry["xxh3_128"]:
            return f"{entry['name']} does not match its hash"
    return None


def _commit(target: Path, state: dict[str, int], entries: list[dict[str, Any]]) -> None:
    (target / "state.json").write_text(json.dumps(state))
    entries = [*entries, _entry(target / "state.json")]
    temporary = target / "manifest.json.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"files": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target / "manifest.json")


def _retain(directory: Path, keep: int) -> None:
    for path in sorted(directory.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(path, ignore_errors=True)


def _entry(file: Path) -> dict[str, Any]:
    return {"name": file.name, "bytes": file.stat().st_size, "xxh3_128": _hash(file)}


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_states(path: Path) -> dict[str, NamedState]:
    states: dict[str, NamedState] = {}
    for file in sorted(path.glob("state-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    if "::" not in name:
                        moments = [tensors.get_tensor(f"{name}::{m}") for m in ("exp_avg", "exp_avg_sq")]
                        states[name] = NamedState(name, tensors.get_tensor(name), *moments)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not readable: {error}. Delete its directory and start again.") from None
    return states
