"""One writer in a run directory at a time."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vae_dist.errors import RunError

_FILE = ".lock"
_WAIT_SECONDS = 120
_POLL_SECONDS = 0.5


def forget_writer(run_dir: Path) -> None:
    """Let others write though a lost process still holds the directory: one on a host that was cut off may live on.

    Only for the driver that knows that its workers were lost: it is theirs that it takes away.
    """
    (run_dir / _FILE).unlink(missing_ok=True)


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; waits for workers of a driver that died, which Ray ends within seconds.

    Raises:
        RunError: another process still holds it after two minutes.
    """
    with open(run_dir / _FILE, "w", encoding="utf-8") as file:
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"Another process is training in {run_dir}. Wait for it, stop it, or use another run.name."
                    ) from None
                time.sleep(_POLL_SECONDS)
        # The lock ends with the file, also when the process is killed.
        yield
