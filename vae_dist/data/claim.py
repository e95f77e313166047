"""One writer at a time for a data set directory, and what an interrupted one left is recognised as such."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vae_dist.errors import DataError

logger = logging.getLogger(__name__)

# Says that a directory is being written, or was when the writer died: its files may be deleted.
MARKER = ".unfinished-data-set"


def is_finished(directory: Path) -> bool:
    """Whether the directory holds a whole data set."""
    return (directory / "manifest.json").exists()


@contextmanager
def claimed(directory: Path) -> Iterator[bool]:
    """Hold `directory` alone, emptied of what an interrupted writer left; waits for another writer.

    Yields:
        whether there is something to write: False when the other writer has finished the data set.

    Raises:
        DataError: the directory holds something that no writer of data sets left there.
    """
    marker = directory / MARKER
    try:
        # Looked at in this order, another writer is never taken for a stranger: its marker comes before its
        # files and goes after its manifest.
        there = directory.exists() and any(directory.iterdir())
        if there and not marker.exists() and not is_finished(directory):
            raise DataError(f"{directory} is not empty and holds no data set. Choose another directory.")
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(marker, "a")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{directory} cannot be written: {error}. Choose another directory.") from None
    with lock:
        _lock(lock)
        if not is_finished(directory):
            for left_over in directory.iterdir():
                if left_over != marker and left_over.is_file():
                    left_over.unlink()
            yield True
        else:
            yield False
        # Not reached when the writer fails: the marker stays, and the next call starts again.
        marker.unlink(missing_ok=True)


def _lock(file: IO[str]) -> None:
    try:
        # Released by the system when the process dies, however it dies.
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning("no file locks in %s (%s): do not prepare the same data set twice at once", file.name, error)
