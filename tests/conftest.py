"""Fixtures for all tests: one Ray cluster for the session, isolated from any other, and a small prepared data set."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import Finished, RayCluster, answers, corpus, free_port, run_command, shared_corpus, wait_for


@pytest.fixture(scope="session")
def ptb() -> Path:
    """The PTB files, where this machine has them."""
    return shared_corpus("ptb")


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set, made once."""
    from vae_dist.config.schema import PrepareConfig
    from vae_dist.data.prepare.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus.txt").write_text("\n".join(corpus()) + "\n", encoding="utf-8")
    prepare(str(folder / "corpus.txt"), folder / "prepared", PrepareConfig(max_tokens=16, member_sequences=100))
    return folder / "prepared"


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of an S3-compatible server on loopback, empty when the session begins."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(port), 60, "the S3 server")
        yield port
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """One Ray head node with token authentication for the whole session, on ports and folders of its own."""
    home = tmp_path_factory.mktemp("home")
    token = home / "token"
    token.write_text(secrets.token_hex(32), encoding="ascii")
    token.chmod(0o600)
    # Unix socket paths must be short, which pytest's folders are not.
    temporary = Path(f"/tmp/vae-{os.getpid()}")
    port, dashboard = free_port(), free_port()
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        # Stop at once: nothing is left to drain when the tests are over.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    start = ["ray", "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=4", "--block"]
    start += [f"--temp-dir={temporary}", "--object-store-memory=200000000", "--include-dashboard=true"]
    start += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    start += [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
    log = open(home / "ray.log", "w")  # noqa: SIM115 - lives as long as the cluster
    head = subprocess.Popen(
        start, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(
            lambda: answers(dashboard), 90, lambda: f"the Ray head node:\n{(home / 'ray.log').read_text()[-2000:]}"
        )
        yield RayCluster(environment, url)
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="session")
def train(ray_cluster: RayCluster) -> Callable[..., Finished]:
    """Run `python -m vae_dist.train` with overrides on the session's cluster."""

    def run(*overrides: str, environment: dict[str, str] | None = None, timeout: float = 240) -> Finished:
        command = [sys.executable, "-m", "vae_dist.train", *overrides]
        return run_command(command, {**ray_cluster.environment, **(environment or {})}, timeout)

    return run
