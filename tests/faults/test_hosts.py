"""A host that is cut off in the middle of a collective: the rest of the cluster goes on without it."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.ledgers import require_exact, steps_of
from faults.runs import SETTINGS
from hosts import Network, end, send
from support import wait_for


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_host_that_is_cut_off_is_done_without(
    network: Network, dataset_dir: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Protected by `cluster.min_workers` in `size_worker_group` (launch/cluster.py): one worker goes on alone."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": ""}
    head, worker = network.add("head"), network.add("worker")
    address = f"{head.address}:6379"
    common = ["--num-cpus=1", "--object-store-memory=150000000", "--disable-usage-stats", "--block"]
    start = ["ray", "start", "--head", f"--node-ip-address={head.address}", "--port=6379", "--include-dashboard=false"]
    nodes = [head.start([*start, *common], environment, tmp_path / "head.log")]
    run, log = tmp_path / "runs/cut", tmp_path / "cut.err"
    try:
        wait_for(lambda: "Ray runtime started" in (tmp_path / "head.log").read_text(), 60, "the head node")
        join = ["ray", "start", f"--address={address}", f"--node-ip-address={worker.address}", *common]
        nodes.append(worker.start(join, environment, tmp_path / "worker.log"))
        wait_for(lambda: "Ray runtime started" in (tmp_path / "worker.log").read_text(), 60, "the second node")
        settings = [*SETTINGS, f"run.storage={tmp_path}/runs", "run.name=cut", f"data.dir={dataset_dir}"]
        settings += ["train.steps=10000000", "run.checkpoint_every_steps=100", "cluster.min_workers=1"]
        command = ["python", "-m", "vae_dist.train", *settings, "train.batch_sequences=64"]
        driver = head.start(command, environment | {"RAY_ADDRESS": address}, log)
        nodes.append(driver)
        ledgers = run / "ledger"
        wait_for(lambda: ledgers.exists() and len(steps_of(run)) > 150, 150, lambda: log.read_text()[-3000:])
        worker.cut_off()
        at, alone = time.time(), ledgers / "rank-00000-of-00001.jsonl"
        wait_for(lambda: alone.exists() and alone.stat().st_size > 0, 200, lambda: log.read_text()[-3000:])
        record_property("recovery_seconds", time.time() - at)
        made = len(steps_of(run))
        wait_for(lambda: len(steps_of(run)) > made + 200, 150, lambda: log.read_text()[-3000:])
        send(driver, signal.SIGTERM)
        driver.wait(timeout=60)
        assert "going on with 1 workers" in log.read_text()
        assert require_exact(run, dataset_dir, len(steps_of(run))) > 2
    finally:
        for node in reversed(nodes):
            end(node)
