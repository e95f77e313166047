"""Where a run's checkpoints are kept: in its directory, or in an object store.

directory of the run   shared by all nodes
object store           a rank's file is written to its own disk and copied from there; the manifest is copied last,
                       as the commit point, since a store has no rename. Whoever loads a checkpoint copies it back,
                       once a host. What lies on the disks is scratch.
"""

from __future__ import annotations

import fcntl
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from pyarrow import fs

from vae_dist.config.schema import RunConfig
from vae_dist.data.store.filesystem import resolve
from vae_dist.data.store.folder import Folder
from vae_dist.data.store.ranges import RangeReader
from vae_dist.data.store.retry import Retries, RetryPolicy
from vae_dist.engine.checkpoint_files import MANIFEST, damage, discard, file_names
from vae_dist.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_PROBE = "writable"

# A store that is away comes back within minutes or is given up.
_READS = RetryPolicy(attempts=24, deadline_seconds=1800.0)
# A file is one request here, however large.
_WRITES = replace(_READS, attempt_seconds=1800.0)


class CheckpointStore(Protocol):
    """Checkpoints by their paths in the run directory, as if they lay there.

    Attributes:
        is_shared: whether what one host has fetched all have.
    """

    is_shared: bool

    def prepare(self) -> None:
        """Called once, before the first step; raises where checkpoints could not be written or deleted.

        A bucket that is not there lists as an empty one.
        """

    def listed(self, directory: Path) -> dict[str, bool]:
        """Names of all checkpoints, the newest first, and whether each has a manifest."""

    def fetch(self, path: Path) -> str | None:
        """Let a whole checkpoint lie at its path; returns what is wrong with one that is not whole, else None."""

    def release(self, path: Path) -> None:
        """This process has read it."""

    def put(self, file: Path) -> None:
        """Keep a file that was written to its path; a manifest makes its checkpoint one."""

    def sizes(self, path: Path, names: Sequence[str]) -> list[int | None]:
        """Bytes of files that are kept of a checkpoint, as this process sees them; None where it does not.

        Asked by name: what a network file system lists may be a minute old.
        """

    def written(self, path: Path) -> None:
        """This process has nothing more to write for a checkpoint."""

    def discard(self, path: Path) -> None:
        """Delete a checkpoint; its manifest first, so that no half of it passes for a whole."""


def open_store(config: RunConfig, run_dir: Path, result_hash: str) -> CheckpointStore:
    """The store of a run. In an object store the hash of what changes the result keeps apart runs of one name.

    Raises:
        DataError: `run.checkpoint_url` cannot be used.
    """
    if config.checkpoint_url is None:
        return InDirectory()
    filesystem, path = resolve(config.checkpoint_url)
    return InObjectStore(Folder(filesystem, f"{path}/{run_dir.name}/{result_hash[:12]}"), run_dir)


def newest_whole(store: CheckpointStore, directory: Path) -> Path | None:
    """The newest checkpoint that is whole, or None; logs the ones passed over. The caller releases it."""
    found, passed_over = choose(store, directory)
    for note in passed_over:
        logger.warning(note)
    return found


def choose(store: CheckpointStore, directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a sentence on each newer one that is not whole."""
    passed_over: list[str] = []
    for path in (directory / name for name in store.listed(directory)):
        problem = store.fetch(path)
        if problem is None:
            return path, passed_over
        passed_over.append(f"checkpoint {path} is passed over: {problem}")
        store.release(path)
    return None, passed_over


def retain(store: CheckpointStore, directory: Path, keep: int, newest: Path) -> None:
    """Delete all but the newest `keep` finished checkpoints up to `newest`, which was just written.

    Later ones are damaged: the run went on from before them. Nobody else may be writing.
    """
    found = store.listed(directory)
    kept = [name for name, is_finished in found.items() if is_finished and name <= newest.name][:keep]
    for name in found.keys() - kept:
        store.discard(directory / name)


class InDirectory:
    """See CheckpointStore."""

    is_shared = True

    def prepare(self) -> None:
        """The run's files are written there, too."""

    def listed(self, directory: Path) -> dict[str, bool]:
        """See CheckpointStore."""
        paths = sorted((path for path in directory.glob("step-*") if path.is_dir()), reverse=True)
        return {path.name: (path / MANIFEST).is_file() for path in paths}

    def fetch(self, path: Path) -> str | None:
        """See CheckpointStore."""
        return damage(path)

    def release(self, path: Path) -> None:
        """It stays."""

    def put(self, file: Path) -> None:
        """It is there."""

    def sizes(self, path: Path, names: Sequence[str]) -> list[int | None]:
        """See CheckpointStore."""
        return [(path / name).stat().st_size if (path / name).is_file() else None for name in names]

    def written(self, path: Path) -> None:
        """It stays."""

    def discard(self, path: Path) -> None:
        """See CheckpointStore."""
        discard(path)


class InObjectStore:
    """See CheckpointStore. What is DIRECTORY/STEP in the run directory is DIRECTORY/STEP below `root` there.

    Raises:
        DataError: of every method but `release` and `written`: the store does not answer, or refuses.
        CheckpointError: of `fetch`: there is no room on the disk.
    """

    is_shared = False

    def __init__(self, root: Folder, run_dir: Path) -> None:
        self._root, self._run_dir = root, run_dir
        self._reads = Retries(_READS, not root.is_local)
        self._writes = Retries(_WRITES, not root.is_local, "written")

    def prepare(self) -> None:
        """See CheckpointStore."""

        def write() -> None:
            self._root.make()
            self._root.write(_PROBE, b"")
            self._root.delete([_PROBE])

        try:
            self._writes.ask(self._root.path, write)
        except OSError as error:
            raise DataError(
                f"{self._root.path} cannot be written: {error}. Check run.checkpoint_url and the bucket in it."
            ) from None

    def listed(self, directory: Path) -> dict[str, bool]:
        """See CheckpointStore."""
        folder = self._there(directory)
        everything = fs.FileSelector(folder.path, allow_not_found=True, recursive=True)
        files = self._reads.ask(folder.path, lambda: folder.filesystem.get_file_info(everything))
        parts = [info.path.removeprefix(folder.path).strip("/").split("/") for info in files if info.is_file]
        found = [(step, name) for step, *name in parts if step.startswith("step-") and name]
        with_manifest = {step for step, name in found if name == [MANIFEST]}
        return {step: step in with_manifest for step in sorted({step for step, _ in found}, reverse=True)}

    def fetch(self, path: Path) -> str | None:
        """See CheckpointStore."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _only_one(path.with_suffix(_LOCK)):
                path.mkdir(exist_ok=True)
                if damage(path) is not None:
                    self._copy_here(path)
                return damage(path)
        except OSError as error:
            discard(path)
            raise CheckpointError(
                f"{path} cannot be copied from the store: {error} (on {socket.gethostname()}). Make room "
                "there, or give another run.storage; the same command goes on from the store."
            ) from None

    def release(self, path: Path) -> None:
        """See CheckpointStore."""
        discard(path)
        path.with_suffix(_LOCK).unlink(missing_ok=True)

    def put(self, file: Path) -> None:
        """See CheckpointStore."""
        folder = self._there(file.parent)
        target = f"{folder.path}/{file.name}"

        def copy() -> None:
            folder.make()
            fs.copy_files(str(file), target, fs.LocalFileSystem(), folder.filesystem)

        self._writes.ask(target, copy)

    def sizes(self, path: Path, names: Sequence[str]) -> list[int | None]:
        """See CheckpointStore."""
        folder = self._there(path)
        paths = [f"{folder.path}/{name}" for name in names]
        files = self._reads.ask(folder.path, lambda: folder.filesystem.get_file_info(paths))
        return [info.size if info.is_file else None for info in files]

    def written(self, path: Path) -> None:
        """See CheckpointStore."""
        discard(path)

    def discard(self, path: Path) -> None:
        """See CheckpointStore."""
        folder = self._there(path)

        def delete() -> None:
            # Asked each time: a request that broke off may have done it.
            if folder.has(MANIFEST):
                folder.delete([MANIFEST])
            folder.remove()

        self._writes.ask(folder.path, delete)

    def _copy_here(self, path: Path) -> None:
        """All files of a checkpoint that are in the store, the manifest last."""
        folder = self._there(path)
        reader = RangeReader(folder.filesystem, folder.path, retry=_READS)
        try:
            manifest = b"".join(reader.chunks(MANIFEST))
        except FileNotFoundError:
            return
        for name in file_names(manifest):
            try:
                with open(path / name, "wb") as file:
                    file.writelines(reader.chunks(name))
            except FileNotFoundError:
                (path / name).unlink()
        (path / MANIFEST).write_bytes(manifest)

    def _there(self, path: Path) -> Folder:
        return self._root.inner(str(path.relative_to(self._run_dir)))


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with open(lock, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
