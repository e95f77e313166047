"""`ray job stop`: a job that was submitted with our runtime environment saves before it ends."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from faults.ledgers import require_exact, steps_of, times_made
from faults.runs import SETTINGS
from support import RayCluster, records, run_command, wait_for

STEPS = 400


@pytest.mark.long
def test_a_stopped_job_saves_and_the_same_command_goes_on(
    ray_cluster: RayCluster, dataset_dir: Path, tmp_path: Path
) -> None:
    """Protected by `signals_to` in `fit` (launch/trainer.py), and by RAY_JOB_STOP_WAIT_TIME_S in runtime_env.yaml."""
    run = tmp_path / "stopped"
    settings = [*SETTINGS, f"run.storage={tmp_path}", "run.name=stopped", f"data.dir={dataset_dir}"]
    settings += ["run.checkpoint_every_steps=10000", f"train.steps={STEPS}"]
    jobs = ["--address", ray_cluster.dashboard]
    train = ["--", "python", "-m", "vae_dist.train", *settings]
    where = ["--runtime-env", "cluster/runtime_env.yaml", "--working-dir", "."]

    def call(*arguments: str) -> str:
        done = run_command(["ray", "job", *arguments], ray_cluster.environment, timeout=200)
        assert done.status == 0, done.out + done.err
        return done.out

    call("submit", *jobs, "--no-wait", "--submission-id", "to-stop", *where, *train)
    wait_for(lambda: any(run.glob("ledger/*.jsonl")) and len(steps_of(run)) > 30, 150, "30 steps")
    (began,) = (record for record in records(run, "event") if "processes" in record)
    rank = int(began["processes"][0].rpartition(":")[2])
    os.kill(rank, signal.SIGSTOP)
    driver = ray_cluster.folder / "session_latest/logs/job-driver-to-stop.log"
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(call, "stop", *jobs, "to-stop")
        wait_for(lambda: "stopping: saving" in driver.read_text(), 60, "the signal")
        # Saving takes longer than the 3 s that Ray gives by itself.
        time.sleep(6)
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)
        stopping.result()
    made = len(steps_of(run))
    assert made < STEPS
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name == f"step-{made:08d}" and (saved / "manifest.json").exists(), "no step is lost"
    out = call("submit", *jobs, *where, *train)
    assert f"resuming from step {made}" in out
    assert require_exact(run, dataset_dir, STEPS) == 3
    assert times_made(run).total() == STEPS
