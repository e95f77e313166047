"""Two hosts: Ray nodes with addresses of their own, token authentication, a run across them submitted from a third."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest
from hosts import INTERFACE, Host, Network, end
from support import ROOT, TINY, records, wait_for

DASHBOARD = 8265


def reaches(host: Host, other: Host, port: int) -> bool:
    return host.run(["bash", "-c", f"timeout 1 bash -c '</dev/tcp/{other.address}/{port}'"]).status == 0


def test_hosts_are_hosts(network: Network) -> None:
    a, b = network.add("a"), network.add("b")
    serve = ["python", "-m", "http.server", "--bind", b.address, "8000"]
    server = b.start([*serve, "--directory", str(network.folder)])
    wait_for(lambda: (b.address, 8000) in b.listening(), 20, "the server")
    assert a.run(["hostname"]).out == "a\n" and a.run(["pgrep", "-f", "http.server"]).status == 1
    assert reaches(a, b, 8000)
    b.cut_off()
    assert not reaches(a, b, 8000)
    b.reconnect()
    assert reaches(a, b, 8000)
    (network.folder / "payload").write_bytes(bytes(2_000_000))
    fetch = f"""
import time, urllib.request
began = time.monotonic()
urllib.request.urlopen("http://{b.address}:8000/payload").read()
print(time.monotonic() - began)
"""
    fast = float(a.run(["python", "-c", fetch]).out)
    b.slow("8mbit")
    slow = float(a.run(["python", "-c", fetch]).out)
    assert fast < 1 < 1.5 < slow < 6, "2 MB take 2 s at 8 Mbit/s"
    b.kill()
    assert server.wait(timeout=10) != 0 and not reaches(a, b, 8000)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": ""}


@pytest.mark.long
def test_a_run_across_hosts_is_submitted_from_a_third(
    network: Network, environment: dict[str, str], dataset_dir: Path, tmp_path: Path
) -> None:
    """Protected by `GLOO_SOCKET_IFNAME` in `use_node_interface` (launch/network.py)."""
    head, worker, person = network.add("head"), network.add("worker"), network.add("person")
    # A worker of the run needs a CPU, and each host has one.
    common = ["--num-cpus=1", "--object-store-memory=150000000", "--disable-usage-stats", "--block"]
    at = f"--node-ip-address={head.address}"
    start = ["ray", "start", "--head", at, "--port=6379", f"--dashboard-host={head.address}", *common]
    nodes = [head.start(start, environment, tmp_path / "head.log")]
    try:
        wait_for(lambda: reaches(worker, head, DASHBOARD), 90, lambda: (tmp_path / "head.log").read_text()[-2000:])
        join = ["ray", "start", f"--address={head.address}:6379", f"--node-ip-address={worker.address}", *common]
        nodes.append(worker.start(join, environment, tmp_path / "worker.log"))
        address = f"http://{head.address}:{DASHBOARD}"
        submit = ["ray", "job", "submit", "--address", address]
        refused = person.run([*submit, "--", "true"], {**environment, "RAY_AUTH_MODE": "disabled"})
        assert refused.status != 0 and "authentication is enabled" in refused.err, refused
        settings = [f"run.storage={tmp_path}/runs", "run.name=across", f"data.dir={dataset_dir}", "train.steps=20"]
        settings += ["cluster.workers=2", "run.log_every_steps=5", "cluster.zero_stage=1"]
        submit += ["--runtime-env", "cluster/runtime_env.yaml", "--working-dir", str(ROOT), "--"]
        wait_for(lambda: (tmp_path / "worker.log").read_text().count("Ray runtime started") == 1, 60, "the second node")
        before = traffic(worker)
        done = person.run([*submit, "python", "-m", "vae_dist.train", *TINY, *settings], environment, timeout=200)
        assert done.status == 0, done.out + done.err
        run = tmp_path / "runs/across"
        assert json.loads((run / "result.json").read_text())["steps"] == 20
        began = next(record for record in records(run, "event") if "zero_stage" in record)
        assert len(began["optimizer_elements_per_rank"]) == 2
        # Each step reduces the gradient, 4 bytes an element, over the wire.
        assert traffic(worker) - before > 20 * 4 * began["parameters"]
    finally:
        for node in reversed(nodes):
            end(node)


def traffic(host: Host) -> int:
    """Bytes that a host has sent."""
    return int(host.run(["cat", f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"]).out)
