"""Random faults, one after the other, for VAE_DIST_SOAK_SECONDS (`make soak`: an hour): nothing lost; the goodput."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults.ledgers import require_exact, steps_of, times_made
from faults.nodes import Node
from faults.runs import Run, StartRun
from support import RayCluster, flip

SECONDS = float(os.environ.get("VAE_DIST_SOAK_SECONDS", "100"))


class Soak:
    """A run on two nodes, and what happens to it."""

    def __init__(self, run: Run, new_node: Callable[[], Node], seed: int) -> None:
        self.run, self._new_node, self._random = run, new_node, random.Random(seed)
        self._node: Node | None = new_node()
        self.done: list[str] = []

    def disturb(self) -> None:
        """One fault, or a node that comes back."""
        if self._node is None:
            return self._do("node comes", self._come)
        faults = [self._kill_worker, self._kill_driver, self._stop, self._kill_node, self._drain, self._damage]
        fault = self._random.choice(faults)
        return self._do(fault.__name__.strip("_"), fault)

    def _do(self, name: str, fault: Callable[[], None]) -> None:
        self.done.append(name)
        fault()
        self.run.wait_for_step(self.run.last_step() + self._random.randint(20, 200), 200)

    def _come(self) -> None:
        self._node = self._new_node()

    def _kill_worker(self) -> None:
        os.kill(self._random.choice(self.run.pids()), signal.SIGKILL)

    def _kill_driver(self) -> None:
        self.run.end()
        self.run.start()

    def _stop(self) -> None:
        self.run.process.send_signal(signal.SIGTERM)
        self.run.finish()
        self.run.start()

    def _kill_node(self) -> None:
        assert self._node is not None
        self._node.kill_raylet()
        self._node = None

    def _drain(self) -> None:
        assert self._node is not None
        self._node.drain()
        self._node = None

    def _damage(self) -> None:
        """Of the newest checkpoint, while the run is stopped."""
        self.run.end()
        whole = sorted(self.run.path.glob("checkpoints/*/manifest.json"))
        if whole:
            flip(next(whole[-1].parent.glob("*.safetensors")), -1)
        self.run.start()


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 600)
def test_random_faults_lose_nothing(
    start_run: StartRun, ray_cluster: RayCluster, dataset_dir: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("VAE_DIST_SOAK_SEED", "0"))
    settings = ["cluster.cpus_per_worker=3", "cluster.min_workers=1", "train.steps=10000000"]
    settings += ["train.batch_sequences=64", "run.log_every_steps=20", "run.checkpoint_every_steps=100"]
    with ExitStack() as nodes:

        def new_node() -> Node:
            node = Node(ray_cluster, 3, tmp_path / f"node-{time.monotonic_ns()}")
            nodes.callback(node.end)
            return node

        began = time.monotonic()
        run = start_run("soak", *settings)
        soak = Soak(run, new_node, seed)
        run.wait_for_step(50)
        while time.monotonic() - began < SECONDS:
            soak.disturb()
        run.process.send_signal(signal.SIGTERM)
        run.finish()
        wall = time.monotonic() - began
    steps = len(steps_of(run.path))
    require_exact(run.path, dataset_dir, steps)
    step_seconds = sorted(r["step_seconds"] for r in run.records() if r["kind"] == "train")
    goodput = steps * step_seconds[len(step_seconds) // 2] / wall
    print(
        json.dumps(
            {
                "seconds": round(wall),
                "faults": len(soak.done),
                "steps": steps,
                "steps_made_again": times_made(run.path).total() - steps,
                "goodput": round(goodput, 3),
                "seed": seed,
            }
        )
    )
    assert len(soak.done) > 1
