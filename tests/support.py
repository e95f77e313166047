"""What the fixtures and tests share: a corpus, processes, ports."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vae_dist.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("VAE_DIST_DATA", ROOT / "../shared/data")).resolve()
SENTENCE_PARTS = (
    ("the old", "a young", "one tired", "the quiet", "every tall"),
    ("sailor", "teacher", "river", "engine", "garden", "window"),
    ("watched", "carried", "followed", "forgot", "painted"),
    ("the long road", "a small boat", "an empty house", "the morning light", "a letter from home"),
    ("in silence", "for many years", "without a word", "after the storm", "near the harbour", "at noon"),
)


def corpus(repeats: int = 1) -> list[str]:
    """4,500 distinct grammatical sentences of 7 to 12 words, in a fixed scrambled order."""
    sentences = [""]
    for part in SENTENCE_PARTS:
        sentences = [f"{s} {p}".strip() for s in sentences for p in part]
    return [sentences[i * 1009 % len(sentences)] for i in range(len(sentences))] * repeats


def write_repeated_corpus(folder: Path, repeated: int) -> str:
    """A file of `corpus()` with the first `repeated` sentences once more at its end."""
    lines = corpus()
    path = folder / "corpus.txt"
    path.write_text("\n".join([*lines, *lines[:repeated]]) + "\n", encoding="utf-8")
    return str(path)


def shared_corpus(name: str) -> Path:
    """A folder or file of the real corpora, where this machine has it; a test that wants it skips, or fails in CI."""
    path = SHARED_DATA / name
    if not path.exists():
        message = f"{name} is not at {path} (set VAE_DIST_DATA)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of standard output."""
        return json.loads(self.out.strip().splitlines()[-1])


@dataclass(frozen=True)
class RayCluster:
    """A running head node: how to reach it, as environment variables; the folder of its logs; its process."""

    environment: dict[str, str]
    dashboard: str
    folder: Path
    pid: int


@contextmanager
def ray_head(home: Path) -> Iterator[RayCluster]:
    """A Ray head node with token authentication, on ports and folders of its own."""
    token = home / "token"
    token.write_text(secrets.token_hex(32), encoding="ascii")
    token.chmod(0o600)
    port, dashboard = free_port(), free_port()
    # Unix socket paths must be short, which pytest's folders are not.
    temporary = Path(f"/tmp/vae-{port}")
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        # Stop at once: nothing is left to drain when the tests are over.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # Ray's own is 15: the clients that a test runs on the same cores would starve what they ask.
        "RAY_worker_niceness": "0",
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
        yield RayCluster(environment, url, temporary, head.pid)
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Of the run's metrics so far, those of one kind, in order."""
    return [record for record in read_metrics(run) if record["kind"] == kind]


def run_command(arguments: list[str], environment: dict[str, str] | None = None, timeout: float = 240) -> Finished:
    """Run a command in the repository; the whole process group ends with it."""
    process = start_command(arguments, environment)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{arguments} took longer than {timeout} s\n{out}\n{err}")
    return Finished(process.returncode, out, err)


def start_command(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in the repository, in a process group of its own."""
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a process of a DeepSpeed group on this machine's CPUs is told by its launcher."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }


def train_in_one_process(data: Path, storage: Path, cases: dict[str, list[str]], timeout: float = 900) -> None:
    """Train cases (name -> arguments of `vae_dist.train`) one after the other, under DeepSpeed and without Ray."""
    worker = str(ROOT / "tests/distributed/options_worker.py")
    command = [sys.executable, worker, str(data), str(storage), json.dumps(cases)]
    done = run_command(command, rank_environment(0, 1, free_port()), timeout)
    assert done.status == 0, f"{done.out}\n{done.err}"


def wait_for(condition: Callable[[], bool], seconds: float, what: str | Callable[[], str]) -> None:
    """Poll until `condition` holds; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"waited {seconds} s for {what() if callable(what) else what}")


def truncate(path: Path) -> None:
    """Cut the last 20 bytes off a file."""
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path, at: int) -> None:
    """Change one bit of a file, of the byte at a place; negative ones count from its end."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


TINY = (
    "model.embedding_dim=16",
    "model.encoder.hidden_dim=24",
    "model.decoder.hidden_dim=24",
    "model.latent_dim=4",
    "model.dropout=0.0",
    "train.precision=fp32",
    "train.batch_sequences=32",
    "data.length_groups=8",
    "optimizer.learning_rate=0.01",
    "optimizer.warmup_steps=5",
    "cluster.cpus_per_worker=1",
    "evaluate.num_samples=4",
)
