"""Checkpoint directories on disk: which are whole, and what is in them. Needs no DeepSpeed.

    step-00000100/
      state-00000-of-00002.safetensors   weights, and what optimizer and average keep for them, of what rank 0 wrote
      state.json                         steps made, tokens read, and the state of the controllers
      manifest.json                      size and xxh3 of every file; written last: the commit point

A directory without a valid manifest is a half-written checkpoint and is never chosen.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from vae_dist.data.store.shards import hash_file
from vae_dist.errors import CheckpointError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
STATE = "state.json"


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


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, or None when every file matches its manifest."""
    manifest = path / MANIFEST
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


def file_names(manifest: bytes) -> list[str]:
    """Names of the files of a manifest; none where it is not readable. They name files of one directory."""
    try:
        names = [str(entry["name"]) for entry in json.loads(manifest)["files"]]
    except (ValueError, KeyError, TypeError):
        return []
    return [name for name in names if Path(name).name == name]


def commit(target: Path, state: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write state.json, then the manifest, which makes the checkpoint one."""
    (target / STATE).write_text(json.dumps(state))
    entries = [*entries, file_entry(target / STATE)]
    temporary = target / "manifest.json.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"files": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target / MANIFEST)


def discard(path: Path) -> None:
    """Delete a checkpoint; its manifest first, so that no half of it passes for a whole."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def file_entry(file: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"name": file.name, "bytes": file.stat().st_size, "xxh3_128": hash_file(file)}


def read_progress(path: Path) -> Progress:
    """The progress a checkpoint was written at."""
    state = _read_json(path / STATE)
    if state["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {state['format_version']}; this vae_dist reads {FORMAT_VERSION}. Finish the "
            "run with the version that began it, or train under another run.name."
        )
    return Progress(state["step"], state["tokens_seen"], state["controllers"])


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class States(Mapping[str, NamedState]):
    """Every parameter's state by name, read when it is asked for, so that a process holds one at a time.

    Raises:
        CheckpointError: a file is not readable.
    """

    def __init__(self, path: Path) -> None:
        # By the manifest: a try on another number of workers may have left files beside.
        names = sorted(entry["name"] for entry in _read_json(path / MANIFEST)["files"])
        self._slots: dict[str, list[str]] = {}
        self._files: dict[str, safe_open] = {}
        for file in (path / name for name in names if name.endswith(".safetensors")):
            try:
                tensors = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(
                    f"{file} is not readable: {error}. Delete its directory and start again."
                ) from None
            for key in tensors.keys():  # noqa: SIM118 - it is no dictionary
                name, _, slot = key.partition("::")
                self._files[name] = tensors
                self._slots.setdefault(name, []).extend([slot] if slot else [])

    def __getitem__(self, name: str) -> NamedState:
        tensors = self._files[name]
        slots = {slot: tensors.get_tensor(f"{name}::{slot}") for slot in self._slots[name]}
        return NamedState(name, tensors.get_tensor(name), slots)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
