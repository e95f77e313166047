"""One writer at a time for a data set directory, and what an interrupted one left is recognised as such."""

from __future__ import annotations

import fcntl
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from pyarrow import fs

from vae_dist.data.prepare.work import PLAN
from vae_dist.data.store.folder import Folder
from vae_dist.errors import DataError

logger = logging.getLogger(__name__)

# Says that a directory is being written, or was when the writer died: our files in it may be deleted.
MARKER = ".unfinished-data-set"
WORK = ".work"
MANIFEST = "manifest.json"
# Changes when the files in the work folder change their meaning.
WORK_VERSION = 1
_OURS = re.compile(r"((train|valid|test)-\d{6}\.tar|(index|shards)\.arrow|(tokenizer|origin|manifest)\.json)(\..*tmp)?")


def is_finished(out: Folder) -> bool:
    """Whether the directory holds a whole data set."""
    return out.has(MANIFEST)


def is_tidy(out: Folder) -> bool:
    """Whether the directory holds a whole data set and nothing else of ours."""
    return is_finished(out) and not out.has(MARKER)


@contextmanager
def claimed(out: Folder) -> Iterator[bool]:
    """Hold a directory alone; waits for another writer. Leaves a finished directory tidy.

    Locks are a matter of local file systems: nothing keeps two writers apart in an object store.

    Yields:
        whether there is something to write: False when the other writer has finished the data set.

    Raises:
        DataError: the directory holds something that no writer of data sets left there, or cannot be written.
    """
    try:
        # Looked at in this order, another writer is never taken for a stranger: its marker comes before its
        # files and goes after its manifest.
        there = out.filesystem.get_file_info(fs.FileSelector(out.path, allow_not_found=True))
        if there and not out.has(MARKER) and not is_finished(out):
            raise DataError(f"{out.path} is not empty and holds no data set. Choose another directory.")
        out.make()
        lock = _lock(out)
    except OSError as error:
        raise DataError(f"{out.path} cannot be written: {error}. Choose another directory.") from None
    try:
        yield not is_finished(out)
        # Not reached when the writer fails: the marker stays, and the next call goes on.
        if is_finished(out):
            out.inner(WORK).remove()
        out.delete(name for name in (MARKER,) if out.has(name))
    finally:
        if lock is not None:
            lock.close()


def open_work(out: Folder, plan: dict[str, Any]) -> Folder:
    """The work folder, with what an interrupted prepare of the same plan finished in it, and nothing of another one.

    Args:
        plan: decides every byte of the data set and of the work folder; JSON-able.
    """
    work = out.inner(WORK)
    plan = {"work_version": WORK_VERSION, **plan}
    if work.has(PLAN):
        try:
            if work.read_json(PLAN) == plan:
                logger.info("going on with what is finished in %s", out.path)
                return work
        except ValueError:
            pass
    work.remove()
    clear(out, keep=())
    work.make()
    work.write_json(PLAN, plan)
    return work


def clear(out: Folder, keep: tuple[str, ...] | set[str]) -> None:
    """Delete what prepares write, but for some of it; files of other names are left alone."""
    out.delete(name for name in out.names() if _OURS.fullmatch(name) and name not in keep)


def _lock(out: Folder) -> IO[str] | None:
    if not out.is_local:
        out.write(MARKER, b"")
        return None
    file = open(f"{out.path}/{MARKER}", "a")  # noqa: SIM115 - held as long as the directory is
    try:
        # Released by the system when the process dies, however it dies.
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning("no file locks in %s (%s): do not prepare the same data set twice at once", file.name, error)
    return file
