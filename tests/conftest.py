"""Fixtures for all tests: one Ray cluster for the session, isolated from any other, and a small prepared data set."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import Network
from support import Finished, RayCluster, answers, corpus, free_port, ray_head, run_command, shared_corpus, wait_for


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
    with ray_head(tmp_path_factory.mktemp("home")) as cluster:
        yield cluster


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """A bridge to put hosts on: `network.add("a")`; skips where this machine cannot make hosts."""
    with Network(tmp_path) as one:
        yield one


@pytest.fixture(scope="session")
def train(ray_cluster: RayCluster) -> Callable[..., Finished]:
    """Run `python -m vae_dist.train` with overrides on the session's cluster."""

    def run(*overrides: str, environment: dict[str, str] | None = None, timeout: float = 240) -> Finished:
        command = [sys.executable, "-m", "vae_dist.train", *overrides]
        return run_command(command, {**ray_cluster.environment, **(environment or {})}, timeout)

    return run
