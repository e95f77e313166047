"""Checkpoint directories on disk: which are whole, and what is in them. Needs no DeepSpeed.

    step-00000100/
      state-00000-of-00002.safetensors   weights, and what optimizer and average keep for them, of what rank 0 wrote
      state.json                         steps made, tokens read, and the state of the controllers
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

import torch
from safetensors import SafetensorError, safe_open

from vae_dist.data.store.shards import hash_file
from vae_dist.errors import CheckpointError

logger = logging.getLogger(__name__)


FORMAT_VERSION = 2


class NamedState(NamedTuple):
    """One parameter or buffer, whole, float32 on the host.

    Attributes:
        slots: what is kept beside the weight: exp_avg, exp_avg_sq and step of Adam, the average of the weight.
    """

    name: str
    weight: torch.Tensor
    slots: dict[str, torch.Tensor]


class Progress(NamedTuple):
    """How far a run has come: optimizer steps made, target tokens read over all ranks.

    Attributes:
        controllers: JSON state of what follows the run's own measurements, see `engine/controllers.py`.
    """

    step: int
    tokens_seen: int
    controllers: dict[str, Any]


def newest_whole(directory: Path) -> Path | None:
    """The newest checkpoint whose files match its manifest, or None; logs the ones passed over."""
    found, passed_over = choose(directory)
    for note in passed_over:
        logger.warning(note)
    return found


def choose(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a sentence on each newer one that is not whole."""
    passed_over: list[str] = []
    for path in sorted(directory.glob("step-*"), reverse=True):
        problem = damage(path)
        if problem is None:
            return path, passed_over
        passed_over.append(f"checkpoint {path} is passed over: {problem}")
    return None, passed_over


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None when every file matches its manifest."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return "it has no manifest.json, so it was never finished"
    try:
        entries = [(e["name"], e["bytes"], e["xxh3_128"]) for e in _read_json(manifest)["files"]]
    except (ValueError, KeyError, TypeError):
        return "its manifest.json is not readable"
    for name, size, digest in entries:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if hash_file(file) != digest:
            return f"{name} does not match its hash"
    return None


def commit(target: Path, state: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write state.json, then the manifest, which makes the checkpoint one."""
    (target / "state.json").write_text(json.dumps(state))
    entries = [*entries, file_entry(target / "state.json")]
    temporary = target / "manifest.json.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"files": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target / "manifest.json")


def retain(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` finished checkpoints, and half-written ones."""
    found = sorted(directory.glob("step-*"), reverse=True)
    finished = [path for path in found if (path / "manifest.json").is_file()]
    for path in set(found) - set(finished[:keep]):
        shutil.rmtree(path, ignore_errors=True)


def file_entry(file: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"name": file.name, "bytes": file.stat().st_size, "xxh3_128": hash_file(file)}


def read_progress(path: Path) -> Progress:
    """The progress a checkpoint was written at."""
    state = _read_json(path / "state.json")
    if state["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {state['format_version']}; this vae_dist reads {FORMAT_VERSION}. Finish the "
            "run with the version that began it, or train under another run.name."
        )
    return Progress(state["step"], state["tokens_seen"], state["controllers"])


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_states(path: Path) -> dict[str, NamedState]:
    """Every parameter's state by name."""
    states: dict[str, NamedState] = {}
    for file in sorted(path.glob("state-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in sorted(tensors.keys()):
                    name, _, slot = key.partition("::")
                    if slot:
                        states[name].slots[slot] = tensors.get_tensor(key)
                    else:
                        states[name] = NamedState(name, tensors.get_tensor(key), {})
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not readable: {error}. Delete its directory and start again.") from None
    return states
