"""Storage that fails: training goes on while it can, and what is half written is never taken for a checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import Disk, disk
from faults.ledgers import require_exact
from faults.runs import Run, StartRun
from safetensors import SafetensorError, safe_open
from support import flip, wait_for

# A checkpoint is 200 kB, two are kept.
MEBIBYTES = 16


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "disk", MEBIBYTES) as one:
        yield one


@pytest.mark.long
def test_a_full_disk_costs_checkpoints_and_no_step(
    start_run: StartRun, small_disk: Disk, undisturbed: Run, dataset_dir: Path
) -> None:
    """Protected by `_try` in engine/checkpoint.py, and by `MetricsWriter` in observe/metrics.py, which keeps what the
    storage refused.
    """
    # The ledger is on the disk, too: it would rather end a run than have gaps.
    run = start_run("full", "run.unwritten_checkpoints=1000", "run.ledger=false", storage=small_disk.path)
    wait_for(lambda: len(run.losses()) > 30, 150, lambda: run.err)
    small_disk.fill()
    wait_for(lambda: "metrics wait in memory" in run.err, 60, lambda: run.err)
    time.sleep(2)
    small_disk.free()
    err = run.finish()
    assert "No space left on device" in err and "starting workers again" not in err, err
    assert "could not be written, training goes on" in run.messages()
    assert run.losses() == undisturbed.losses(), "no record is lost either"
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["step-00000380", "step-00000400"]


@pytest.mark.long
def test_a_disk_that_stays_full_ends_the_run_where_it_can_be_resumed(
    start_run: StartRun, small_disk: Disk, undisturbed: Run
) -> None:
    """Protected by `_count_failures` in engine/run.py."""
    run = start_run("stuck", "run.unwritten_checkpoints=3", "run.ledger=false", storage=small_disk.path)
    wait_for(lambda: len(run.losses()) > 30, 150, lambda: run.err)
    small_disk.fill()
    err = run.finish(status=1)
    assert "resumes from the newest whole checkpoint" in err, err
    given_up = re.search(r"The checkpoint of step (\d+) could not be written to", err)
    assert given_up and int(given_up[1]) < 400, "it ends when the third is refused, not when the steps are made"
    small_disk.free()
    newest = max(path.parent.name for path in run.path.glob("checkpoints/*/manifest.json"))
    run.start()
    assert f"resuming from step {int(newest.removeprefix('step-'))}:" in run.finish()
    assert run.losses() == undisturbed.losses()


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_checkpoint_that_one_rank_did_not_finish_is_not_one(
    start_run: StartRun, dataset_dir: Path, storage: Path
) -> None:
    """Both ranks are killed when one of them has written its file and the other has not.

    Protected by `damage` in engine/checkpoint_files.py, to which a directory without a manifest is no checkpoint, and
    by `CheckpointWriter._write` in engine/checkpoint.py, which gathers the files of all ranks before it commits.
    """
    # Files of 20 and of 40 MB: time enough to stop a rank that writes one.
    wide = ["model.encoder.hidden_dim=768", "model.decoder.hidden_dim=768", "run.checkpoint_every_steps=5"]
    run = start_run("torn", *wide, "cluster.max_restarts=0", "train.steps=60")
    torn = stop_in_its_file(run, rank=1)
    wait_for(lambda: is_whole(torn / "state-00000-of-00002.safetensors"), 60, "the file of the other rank")
    # A commit that does not wait for all ranks would be made now.
    time.sleep(2)
    assert not (torn / "manifest.json").exists()
    for pid in run.pids():
        os.kill(pid, signal.SIGKILL)
    step = int(torn.name.removeprefix("step-"))
    run.finish(status=1)
    run.start()
    err = run.finish()
    assert f"resuming from step {step - 5}" in err and f"{torn.name} is passed over" in err, err
    require_exact(run.path, dataset_dir, 60)


def stop_in_its_file(run: Run, rank: int) -> Path:
    """Stop a rank while it writes its share of a checkpoint; returns the checkpoint."""
    run.wait_for_step(6)
    pid = run.pids()[rank]
    while run.process.poll() is None:
        for folder in sorted((run.path / "checkpoints").glob("step-*"))[-1:]:
            file = folder / f"state-{rank:05d}-of-00002.safetensors"
            if not is_whole(file):
                os.kill(pid, signal.SIGSTOP)
                if not is_whole(file):
                    return folder
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.0005)
    pytest.fail(f"the run ended before a file was caught half written:\n{run.err}")


def is_whole(file: Path) -> bool:
    """Whether it is as long as its header says."""
    try:
        with safe_open(file, framework="np"):
            return True
    except (SafetensorError, OSError):
        return False


@pytest.mark.long
def test_a_damaged_newest_checkpoint_is_passed_over(
    start_run: StartRun, undisturbed: Run, dataset_dir: Path, storage: Path
) -> None:
    """Protected by the comparison of hashes in `damage` (engine/checkpoint_files.py)."""
    run = storage / "damaged"
    shutil.copytree(undisturbed.path, run)
    (run / "result.json").unlink()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    flip(next(newest.glob("*.safetensors")), -1)
    resumed = start_run("damaged")
    err = resumed.finish()
    assert "resuming from step 380" in err and "does not match its hash" in err, err
    assert resumed.losses() == undisturbed.losses()
    require_exact(run, dataset_dir, 400)
