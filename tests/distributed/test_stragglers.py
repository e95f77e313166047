"""A worker that is slowed or stopped is named; its run ends with the other ranks' stacks. Signals to real processes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import TINY, RayCluster, records, start_command, wait_for

HANG_SECONDS = 6.0
LATE = 1


def trace_events(run: Path, rank: int) -> list[dict[str, Any]]:
    """The array, closed as Perfetto does for itself; a last line that is being written is left out."""
    path = run / "trace" / f"rank-{rank:05d}.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else "["
    return json.loads(whole.removesuffix(",") + "]")


def messages(run: Path) -> list[str]:
    return [record["message"] for record in records(run, "event")]


def dumped(run: Path) -> tuple[dict[str, Any], str]:
    """What the watchdog of rank 0, alone, has written."""
    (path,) = (run / "hang").glob("*.txt")
    text = path.read_text()
    assert path.name == "rank-00000.txt"
    return json.loads(text.splitlines()[0]), text


def slow_down(process: int, until: float) -> None:
    """Let a process run a tenth of the time for a while."""
    while time.monotonic() < until:
        os.kill(process, signal.SIGSTOP)
        time.sleep(0.09)
        os.kill(process, signal.SIGCONT)
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_slow_and_then_stopped_worker_is_named(ray_cluster: RayCluster, dataset_dir: Path, tmp_path: Path) -> None:
    """Protected by the watchdog that `_start_watchdog` starts (engine/start.py)."""
    settings = [*TINY, f"run.storage={tmp_path}", "run.name=late", f"data.dir={dataset_dir}", "train.steps=1000000"]
    settings += ["run.log_every_steps=20", "evaluate.every_steps=1000000", "run.checkpoint_every_steps=1000000"]
    settings += ["run.trace_steps=[1, 1000000]", f"run.hang_seconds={HANG_SECONDS}", "cluster.workers=2"]
    run = tmp_path / "late"
    process = start_command([sys.executable, "-m", "vae_dist.train", *settings], ray_cluster.environment)
    worker = None
    try:
        wait_for(lambda: len(trace_events(run, LATE)) > 500, 200, lambda: f"100 steps, {process.poll()}")
        assert not [one for one in messages(run) if f"rank {LATE} on" in one]
        worker = trace_events(run, LATE)[-1]["tid"]
        # Before the workers that follow make these steps again.
        check_trace(trace_events(run, 0), 0)

        def named() -> bool:
            slow_down(worker, time.monotonic() + 1.0)
            return any(one.startswith(f"rank {LATE} on {socket.gethostname()} is slow") for one in messages(run))

        wait_for(named, 60, lambda: f"the slow rank to be named: {messages(run)}")
        os.kill(worker, signal.SIGSTOP)
        wait_for(lambda: any((run / "hang").glob("*.txt")), 4 * HANG_SECONDS, "the other rank's stack")
        # It is there for a fifth of the limit before that rank dies, and until the workers that follow begin.
        time.sleep(0.5)
        about, stack = dumped(run)
        # Ray ends the stopped worker, too, and the launcher starts others, who tell what happened.
        wait_for(lambda: any("did not end" in one for one in messages(run)), 90, lambda: f"{messages(run)}")
        wait_for(lambda: not Path(f"/proc/{worker}").exists(), 30, "the stopped worker to be gone")
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if worker:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    assert process.returncode == 0 and "starting workers again (1 of" in errors, errors
    assert f"waited for rank {LATE} on {socket.gethostname()} wrote no stack: it is stopped or gone" in errors, errors
    # It waits where ranks agree on a step, or for the sum of the gradients.
    waits = "all_reduce" in stack or "average_gradients" in stack
    assert about["seconds"] > HANG_SECONDS and waits and "engine/loop.py" in stack, stack


def check_trace(events: list[dict[str, Any]], rank: int) -> None:
    """Steps are cut into spans that nest and hardly leave anything out."""
    naming, *spans = events
    assert naming["ph"] == "M" and naming["args"]["name"] == f"rank {rank} on {socket.gethostname()}"
    assert all(span["ph"] == "X" and span["pid"] == rank for span in spans)
    of_step = {step: [s for s in spans if s["args"]["step"] == step] for step in range(10, 60)}
    for step, inside in of_step.items():
        # In the order in which they end: the reduction before the backward pass that it is part of.
        names = [span["name"] for span in inside]
        assert names == ["data_wait", "agree", "forward", "reduce", "backward", "optimizer"], (step, names)
        at = {span["name"]: (span["ts"], span["ts"] + span["dur"]) for span in inside}
        assert at["backward"][0] <= at["reduce"][0] <= at["reduce"][1] <= at["backward"][1]
        in_turn = [at[name] for name in ("data_wait", "agree", "forward", "backward", "optimizer")]
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(in_turn))
    first, last = of_step[10][0], of_step[59][-1]
    in_spans = sum(span["dur"] for inside in of_step.values() for span in inside if span["name"] != "reduce")
    assert in_spans > 0.6 * (last["ts"] + last["dur"] - first["ts"])
