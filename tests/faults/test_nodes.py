"""Nodes that drain, die and come: the run goes on with the workers that there is room for."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults.ledgers import require_exact, steps_of, times_made
from faults.nodes import Node
from faults.runs import Run, StartRun, seconds_to_next_step
from support import RayCluster

# A worker on the head node, which has four CPUs, and one on another.
APART = (
    "cluster.cpus_per_worker=3",
    "cluster.min_workers=1",
    # Until it is stopped: how fast steps are depends on the machine.
    "train.steps=10000000",
    "train.batch_sequences=64",
    "run.checkpoint_every_steps=100",
)


@pytest.fixture
def new_node(ray_cluster: RayCluster, tmp_path: Path) -> Iterator[Callable[[str], Node]]:
    with ExitStack() as nodes:

        def start(name: str) -> Node:
            node = Node(ray_cluster, 3, tmp_path / name)
            nodes.callback(node.end)
            return node

        yield start


def wait_for_workers(run: Run, count: int, seconds: float = 120) -> int:
    """Until so many workers train; returns the step that they began at."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        began = [r for r in run.records() if "processes" in r]
        if began and len(began[-1]["processes"]) == count and run.last_step(count) > began[-1]["step"] + 5:
            return int(began[-1]["step"])
        assert run.process.poll() is None, run.err
        time.sleep(0.1)
    pytest.fail(f"no {count} workers after {seconds} s:\n{run.err}")


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.timeout(600)
def test_nodes_drain_come_and_die(
    stage: int,
    start_run: StartRun,
    new_node: Callable[[str], Node],
    dataset_dir: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Protected by `leaving & nodes` in `_Watch` (launch/supervise.py): without it what was made since the last
    checkpoint is made again.
    """
    first = new_node("first")
    run = start_run(f"elastic{stage}", *APART, f"cluster.zero_stage={stage}")
    wait_for_workers(run, 2)
    at = time.time()
    first.drain()
    left = wait_for_workers(run, 1)
    record_property("drain_seconds", time.time() - at)
    assert left > 0 and max(times_made(run.path).values()) == 1, "a node that drains costs no step"
    assert first.process.wait(timeout=60) is not None
    second = new_node("second")
    grown = wait_for_workers(run, 2)
    assert grown > left and max(times_made(run.path).values()) == 1, "room for more costs no step"
    at = time.time()
    second.kill_raylet()
    record_property("recovery_seconds", seconds_to_next_step(run, at))
    wait_for_workers(run, 1)
    run.wait_for_step(run.last_step() + 200)
    run.process.send_signal(signal.SIGTERM)
    err = run.finish()
    assert "a node is about to leave the cluster" in err and "room for more workers" in err, err
    assert err.count("going on with 1 workers") == 2 and err.count("going on with 2 workers") == 1, err
    repeated = [step for step, times in times_made(run.path).items() if times > 1]
    assert len(repeated) < 100, "at most what was made since the last checkpoint"
    assert require_exact(run.path, dataset_dir, len(steps_of(run.path))) > 2
