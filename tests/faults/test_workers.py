"""Workers that die: the run goes on by itself, to the same end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.ledgers import require_exact
from faults.runs import Run, StartRun, seconds_to_next_step


def same_model(run: Run, other: Run) -> bool:
    ours, theirs = ((one.path / "model/model.safetensors").read_bytes() for one in (run, other))
    return ours == theirs


def test_an_undisturbed_run_reads_every_sequence_once_an_epoch(undisturbed: Run, dataset_dir: Path) -> None:
    assert require_exact(undisturbed.path, dataset_dir, 400) == 3
    written = [r for r in undisturbed.records() if r["kind"] == "checkpoint"]
    assert [r["step"] for r in written] == list(range(20, 401, 20))
    # Every stall is in the account of the wall time.
    accounted = next(r for r in undisturbed.records() if r["kind"] == "time")["wall_checkpoint_seconds"]
    assert sum(r["blocked_seconds"] for r in written) <= accounted


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    rank: int, start_run: StartRun, undisturbed: Run, dataset_dir: Path, record_property: Callable[[str, object], None]
) -> None:
    """Protected by `except WorkersLostError` in `Supervisor.run` (launch/supervise.py), which starts others, and by
    `load_state` in engine/zero.py: without the optimizer's moments the losses are others.
    """
    run = start_run(f"killed{rank}")
    run.wait_for_step(50)
    at = time.time()
    os.kill(run.pids()[rank], signal.SIGKILL)
    record_property("recovery_seconds", seconds_to_next_step(run, at))
    err = run.finish()
    assert "starting workers again (1 of 3)" in err and "resuming from step" in err, err
    assert run.losses() == undisturbed.losses(), "the same number of workers must give the same bits"
    assert same_model(run, undisturbed)
    require_exact(run.path, dataset_dir, 400)


@pytest.mark.long
def test_workers_that_die_without_progress_end_the_run(start_run: StartRun) -> None:
    """Protected by `lost > ...max_restarts` in `Supervisor.run` (launch/supervise.py)."""
    run = start_run("hopeless", "cluster.max_restarts=1", "run.checkpoint_every_steps=10000")
    for _ in range(2):
        run.wait_for_step(0)
        count = len([r for r in run.records() if "processes" in r])
        os.kill(run.pids()[1], signal.SIGKILL)
        while run.process.poll() is None and len([r for r in run.records() if "processes" in r]) <= count:
            time.sleep(0.1)
    err = run.finish(status=1)
    assert "starting workers again (1 of 1)" in err and "The training workers failed" in err, err
