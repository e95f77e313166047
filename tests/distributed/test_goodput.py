"""Where the wall time of a real run went: killed and resumed, against what the test's own clock and the metrics say."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import TINY, Finished, RayCluster, records, start_command, wait_for

from vae_dist.config.load import load_config
from vae_dist.data.store.dataset import Dataset
from vae_dist.estimate.trace import Shape, micro_batch_cost
from vae_dist.observe.wall_time import PARTS

# Processes start and end between two looks at the clock.
TOLERANCE_SECONDS = 3.0


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_killed_run_knows_what_it_lost(
    ray_cluster: RayCluster, train: Callable[..., Finished], dataset_dir: Path, tmp_path: Path
) -> None:
    """Protected by `_go_on` in `WallTime` (observe/wall_time.py)."""
    settings = [*TINY, f"run.storage={tmp_path}", "run.name=lost", f"data.dir={dataset_dir}", "train.steps=300"]
    settings += ["run.log_every_steps=1", "evaluate.every_steps=50", "run.checkpoint_every_steps=100"]
    settings += ["run.peak_flops=1e9", "cluster.workers=2"]
    run = tmp_path / "lost"
    began = time.time()
    process = start_command([sys.executable, "-m", "vae_dist.train", *settings], ray_cluster.environment)
    try:
        wait_for(lambda: len(records(run, "train")) >= 160, 180, lambda: f"160 steps, {process.poll()}")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    # The workers end a moment after their driver.
    time.sleep(3.0)
    left = json.loads((run / "wall_time.json").read_text())
    before = {record["step"]: record for record in records(run, "train")}
    assert abs(left["step"] - max(before)) * before[160]["step_seconds"] < 2.0
    done = train(*settings)
    assert done.status == 0, done.err
    counted_until = (run / "wall_time.json").stat().st_mtime
    (last,) = records(run, "time")
    resumed = next(r["step"] for r in records(run, "event") if r["message"].startswith("resuming"))

    assert last["lost_steps"] == left["step"] - resumed > 0
    measured_otherwise = sum(before[step]["step_seconds"] for step in before if resumed < step <= left["step"])
    assert last["wall_lost_work_seconds"] == pytest.approx(measured_otherwise, abs=0.7)
    parts = {part: last[f"wall_{part}_seconds"] for part in PARTS}
    assert all(seconds > 0.0 for seconds in parts.values()), parts
    assert sum(parts.values()) == pytest.approx(last["wall_seconds"], rel=1e-9)
    # Then the model is exported and the report written.
    assert last["wall_seconds"] == pytest.approx(counted_until - began, abs=TOLERANCE_SECONDS)
    assert last["goodput"] == pytest.approx(parts["step"] / last["wall_seconds"])
    assert parts["restart"] == pytest.approx(records(run, "train")[resumed]["wall_restart_seconds"])

    (started,) = (r["message"] for r in records(run, "event") if r["message"].startswith("first step after"))
    whole, *spent = (float(number) for number in re.findall(r"\d+\.\d", started))
    assert len(spent) == 5 and whole == pytest.approx(sum(spent), abs=0.3), started
    assert whole == pytest.approx(parts["initialise"] + before[1]["step_seconds"], abs=1.0), (started, parts)

    # FLOPs per token x tokens per second / (workers x peak).
    dataset = Dataset.open(str(dataset_dir))
    tokens = round(dataset.split("train").tokens / dataset.split("train").sequences)
    cost = micro_batch_cost(
        load_config(None, settings), dataset.tokenizer.vocab_size, Shape(1, tokens), None, gpu=False
    )
    record = records(run, "train")[10]
    flops_per_token = (cost.forward_flops + cost.backward_flops) / tokens
    assert record["mfu"] == pytest.approx(flops_per_token * record["tokens_per_second"] / (2 * 1e9))
    assert "goodput" in done.err and done.json["goodput"] == last["goodput"]
    assert "Goodput" in (run / "report.html").read_text()
