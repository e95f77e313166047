"""A step that does not end: every rank writes the stacks of its threads and dies, so that the run ends or is restarted.

The thread that trains is inside a collective then, where no exception reaches it. Which rank the others waited for
follows from the files in `hang/`: it is further back than they are, or it has not written one.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vae_dist.observe.activity import Activity

EXIT_STATUS = 75
_LOOKS = 20
# For the other ranks to write their stacks, before the death of this one fails their collectives: a share of the limit.
_GRACE = 0.2


class Watchdog:
    """Watches one rank; does nothing before its first step, and while `is_training` says that no step is made."""

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        hosts: list[str],
        activity: Activity,
        seconds: float,
        is_training: Callable[[], bool],
    ) -> None:
        """Begin to watch.

        Args:
            hosts: of all ranks, in their order.
            seconds: that a rank may spend in one span of a step.
        """
        self._folder, self._rank, self._activity = run_dir / "hang", rank, activity
        self._seconds, self._is_training, self._over = seconds, is_training, threading.Event()
        if rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir()
            (self._folder / "hosts.json").write_text(json.dumps(hosts), encoding="utf-8")
        self._first_step = activity.step
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Watch no longer."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._seconds / _LOOKS):
            silent = time.monotonic() - self._activity.changed_at
            if self._activity.step > self._first_step and self._is_training() and silent > self._seconds:
                self._give_up(silent)

    def _give_up(self, silent: float) -> None:
        activity = self._activity
        about = {"step": activity.step + 1, "span": activity.name, "changes": activity.changes, "seconds": silent}
        with open(self._folder / f"rank-{self._rank:05d}.txt", "w", encoding="utf-8") as file:
            file.write(json.dumps(about) + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            os.fsync(file.fileno())
        time.sleep(_GRACE * self._seconds)
        os._exit(EXIT_STATUS)


def hang_message(run_dir: Path, since: float = 0.0) -> str | None:
    """What the watchdogs of a run found that ended after `since`, naming the late ranks and their hosts; or None."""
    folder = run_dir / "hang"
    recent = (path for path in folder.glob("rank-*.txt") if path.stat().st_mtime >= since)
    dumps = {int(path.stem.removeprefix("rank-")): path for path in recent}
    if not dumps:
        return None
    hosts = json.loads((folder / "hosts.json").read_text(encoding="utf-8"))
    found = {rank: json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0]) for rank, path in dumps.items()}
    first = found[min(found)]
    silent = [f"rank {rank} on {hosts[rank]}" for rank in range(len(hosts)) if rank not in found]
    furthest = max(one["changes"] for one in found.values())
    behind = [
        f"rank {rank} on {hosts[rank]}, in {one['span'] or 'between two spans'}"
        for rank, one in found.items()
        if one["changes"] < furthest
    ]
    late = "; ".join([f"{one} wrote no stack: it is stopped or gone" for one in silent] + behind)
    return (
        f"Step {first['step']} did not end: nothing happened for {first['seconds']:.0f} s. The others waited for "
        f"{late or 'nobody that can be told: all ranks are equally far'}. The stacks are in {folder}."
    )
