"""A disk that can be full or read-only: a tmpfs of its own, which needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A small file system, mounted at `path`."""

    def __init__(self, path: Path, mebibytes: int) -> None:
        self.path = path
        path.mkdir(parents=True)
        if os.geteuid() != 0:
            pytest.skip("mounting a disk needs root")
        done = _mount("-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path))
        if done.returncode != 0:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")

    def fill(self) -> None:
        """Leave no room: every write is refused with ENOSPC."""
        with open(self.path / "filler", "wb", buffering=0) as file:
            for block in (2**16, 2**12, 1):
                try:
                    while True:
                        file.write(bytes(block))
                except OSError:
                    pass

    def free(self) -> None:
        """Undo `fill`."""
        (self.path / "filler").unlink()

    def remove(self) -> None:
        """Unmount it; processes that still have files there keep them."""
        subprocess.run(["umount", "--lazy", str(self.path)], capture_output=True)


@contextmanager
def disk(path: Path, mebibytes: int) -> Iterator[Disk]:
    """A disk for the time of a `with` block."""
    one = Disk(path, mebibytes)
    try:
        yield one
    finally:
        one.remove()


def _mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True)
