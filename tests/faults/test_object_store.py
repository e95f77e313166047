"""Checkpoints in an object store that goes away, and workers that lose their disks: what is in the store is enough."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, Schedule
from faults.runs import Run, StartRun
from pyarrow import fs
from support import wait_for

AWAY_SECONDS = 60.0
BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def bucket(s3_port: int) -> fs.SubTreeFileSystem:
    options = {"scheme": "http", "endpoint_override": f"127.0.0.1:{s3_port}", "region": "us-east-1"}
    s3 = fs.S3FileSystem(**options, access_key="k", secret_key="s", allow_bucket_creation=True)
    s3.create_dir(BUCKET)
    return fs.SubTreeFileSystem(BUCKET, s3)


@pytest.fixture
def proxy(bucket: fs.FileSystem, s3_port: int) -> Iterator[FaultProxy]:
    """Between the runs and the store."""
    with FaultProxy(s3_port) as one:
        yield one


def url(proxy: FaultProxy) -> str:
    place = f"scheme=http&endpoint_override=127.0.0.1:{proxy.port}&region=us-east-1"
    return f"run.checkpoint_url=s3://k:s@{BUCKET}/ours?{place}"


def kept(bucket: fs.FileSystem, name: str) -> dict[str, set[str]]:
    """Checkpoint -> its files."""
    found: dict[str, set[str]] = {}
    for info in bucket.get_file_info(fs.FileSelector(f"ours/{name}", recursive=True)):
        if info.is_file:
            path = Path(info.path)
            found.setdefault(path.parent.name, set()).add(path.name)
    return found


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_store_that_is_away_for_a_minute_costs_no_step(
    start_run: StartRun, proxy: FaultProxy, bucket: fs.FileSystem, undisturbed: Run
) -> None:
    """Protected by `_PATIENCE` in engine/checkpoint_store.py: asked once, the store gets no checkpoint."""
    run = start_run("away", url(proxy))
    run.wait_for_step(30)
    proxy.begin(Schedule(("reset_before",), 1.0))
    time.sleep(AWAY_SECONDS)
    assert proxy.faults["reset_before"] > 0
    proxy.begin(Schedule())
    err = run.finish()
    assert "starting workers again" not in err and "could not be written" not in run.messages(), err
    assert run.losses() == undisturbed.losses()
    files = {"state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors", "state.json", "manifest.json"}
    assert kept(bucket, "away") == {"step-00000380": files, "step-00000400": files}
    assert list((run.path / "checkpoints").iterdir()) == [], "the disk is scratch"


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_run_that_lost_its_disk_goes_on_from_the_store_and_not_from_what_is_torn(
    start_run: StartRun, proxy: FaultProxy, bucket: fs.FileSystem, undisturbed: Run
) -> None:
    """The ranks are killed when all files of step 100 are in the store, but its manifest.

    Protected by `InObjectStore.fetch` in engine/checkpoint_store.py, which returns what `damage` finds.
    """
    run = start_run("torn-store", url(proxy), "cluster.max_restarts=0")
    run.wait_for_step(30)
    proxy.begin(Schedule(("stall",), 1.0, only="step-00000100/manifest.json"))
    wait_for(lambda: proxy.faults["stall"], 150, "the manifest of step 100")
    for pid in run.pids():
        os.kill(pid, signal.SIGKILL)
    run.finish(status=1)
    found = kept(bucket, "torn-store")
    assert sorted(found) == ["step-00000060", "step-00000080", "step-00000100"]
    assert "manifest.json" not in found["step-00000100"] and "state.json" in found["step-00000100"]
    proxy.begin(Schedule())
    shutil.rmtree(run.path)
    run.start()
    err = run.finish()
    assert "step-00000100 is passed over" in err and "resuming from step 80" in err, err
    assert run.losses() == {step: loss for step, loss in undisturbed.losses().items() if step > 80}
    assert sorted(kept(bucket, "torn-store")) == ["step-00000380", "step-00000400"]
