"""Runs that faults are done to: started as a user starts them, watched through their ledgers, compared at their end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import ROOT, TINY, RayCluster, wait_for

from vae_dist.observe.metrics import read_metrics

SETTINGS = (
    *TINY,
    "model.dropout=0.2",
    "train.steps=400",
    "run.log_every_steps=1",
    "run.ledger=true",
    "run.checkpoint_every_steps=20",
    "evaluate.every_steps=10000",
    "cluster.workers=2",
)


class Run:
    """A training in a process of its own."""

    def __init__(self, cluster: RayCluster, storage: Path, log: Path, name: str, *settings: str) -> None:
        self.path = storage / name
        self._cluster = cluster
        # A pipe that nobody reads would stop the run when it is full.
        self._log = log
        self._settings = [*SETTINGS, f"run.storage={storage}", f"run.name={name}", *settings]
        self.start()

    def start(self) -> None:
        """Give the command, the first time or again."""
        command = [sys.executable, "-m", "vae_dist.train", *self._settings]
        with open(self._log, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **self._cluster.environment},
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    @property
    def err(self) -> str:
        """Its standard error so far."""
        return self._log.read_text(encoding="utf-8")

    def wait_for_step(self, step: int, seconds: float = 150) -> None:
        """Until some rank has made it."""

        def made() -> bool:
            assert self.process.poll() is None, self.err
            return self.last_step() >= step

        wait_for(made, seconds, lambda: f"step {step}; the last one was {self.last_step()}")

    def last_step(self, workers: int | None = None) -> int:
        """The newest step in the ledgers, or in those of so many workers; -1 before the first."""
        steps = [-1]
        for path in self.path.glob(f"ledger/*-of-{workers:05d}.jsonl" if workers else "ledger/*.jsonl"):
            steps += [int(found) for found in re.findall(r'^\{"step": (\d+),', path.read_text(), re.MULTILINE)[-1:]]
        return max(steps)

    def pids(self) -> list[int]:
        """The processes of the ranks that train now."""
        began = [record for record in self.records() if "processes" in record][-1]
        return [int(process.rpartition(":")[2]) for process in began["processes"]]

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return read_metrics(self.path)

    def messages(self) -> str:
        """What the run told in events, in order."""
        return "\n".join(record["message"] for record in self.records() if record["kind"] == "event")

    def losses(self) -> dict[int, float]:
        """Step -> ELBO."""
        return {r["step"]: r["elbo_per_seq"] for r in self.records() if r["kind"] == "train"}

    def finish(self, seconds: float = 240, status: int = 0) -> str:
        """Wait for the end; returns standard error."""
        assert self.process.wait(timeout=seconds) == status, self.err
        assert "Traceback" not in self.err, self.err
        return self.err

    def end(self) -> None:
        """Kill it, if it is still there."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


# By name, with settings.
StartRun = Callable[..., Run]


def seconds_to_next_step(run: Run, fault_at: float, seconds: float = 200) -> float:
    """How long after a fault (time.time()) the workers that were started for the lost ones made their first step."""

    def started() -> list[int]:
        assert run.process.poll() is None, run.err
        return [record["step"] for record in run.records() if "processes" in record]

    # A resumed run drops what it told beyond the step that it goes on from, so that the newest start may be another.
    before = started()
    wait_for(lambda: started() != before, seconds, "other workers")
    sizes = {path: path.stat().st_size for path in run.path.glob("ledger/*.jsonl")}

    def grew() -> bool:
        return any(path.stat().st_size > sizes.get(path, 0) for path in run.path.glob("ledger/*.jsonl"))

    wait_for(grew, seconds, "the next step")
    return time.time() - fault_at
