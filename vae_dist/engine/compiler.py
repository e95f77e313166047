"""The compiler that DeepSpeed needs where there is no GPU, and the lock that torch takes while it compiles."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from vae_dist.errors import MachineError


def search_path() -> str:
    """PATH with this Python's own folder: there ninja lies in a virtual environment that is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def require_compiler() -> None:
    """DeepSpeed compiles its communication extension when it starts on CPUs; say early what that needs.

    Raises:
        MachineError: g++ or ninja is not on PATH.
    """
    os.environ["PATH"] = search_path()
    for tool, remedy in (("g++", "apt-get install g++"), ("ninja", "pip install ninja, or activate .venv")):
        if shutil.which(tool) is None:
            raise MachineError(
                f"DeepSpeed needs {tool} to compile an extension, and it is not on PATH of {socket.gethostname()}. "
                f"Run: {remedy}."
            )


@contextmanager
def one_compiles() -> Iterator[None]:
    """One process of this host at a time, and never waiting for one that is gone.

    A process that is killed while it compiles leaves torch's lock behind, and whoever compiles next would wait for
    ever (https://github.com/pytorch/pytorch/issues/189245).
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "vae_dist.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for lock in root.glob("**/deepspeed_*/lock"):
            if not _is_held(lock):
                lock.unlink(missing_ok=True)
        yield


def _is_held(lock: Path) -> bool:
    """Whether some process has the file open, as torch does until it releases it."""
    wanted = lock.stat()
    for held in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = held.stat()
        except OSError:
            # It was closed, its process has ended, or is somebody else's.
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False
