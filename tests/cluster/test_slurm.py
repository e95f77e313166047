"""The Slurm script on two hosts: real `ray symmetric-run` and training, with Slurm's commands played by stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import pytest
from hosts import Host, Network, send
from support import ROOT, TINY, records, wait_for

# What the script calls; each asks the test, which stands outside the hosts, to act.
STAND_IN = f"""#!{sys.executable}
import os, sys
from multiprocessing.connection import Client
with Client(os.environ["STAND_IN"]) as test:
    test.send((os.path.basename(sys.argv[0]), sys.argv[1:], dict(os.environ)))
    status, output = test.recv()
print(output, end="")
sys.exit(status)
"""


class Slurm:
    """Runs steps on hosts for the `srun` and `scontrol` of a batch script."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.requeued: list[str] = []
        self.commands = folder / "bin"
        self.commands.mkdir()
        for name in ("srun", "scontrol"):
            (self.commands / name).write_text(STAND_IN)
            (self.commands / name).chmod(0o755)
        # pytest's folders are too long for a socket's path.
        self.socket = f"/tmp/vd-{os.getpid()}.sock"
        self._listener = Listener(self.socket, "AF_UNIX")
        threading.Thread(target=self._serve, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What sbatch sets."""
        return {
            "STAND_IN": self.socket,
            "PATH": f"{self.commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "nodes[1-2]",
            "SLURM_JOB_NUM_NODES": str(len(self.hosts)),
            "SLURM_CPUS_ON_NODE": "1",
            "SLURM_JOB_ID": "42",
        }

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        name, arguments, environment = connection.recv()
        connection.send(self._control(arguments) if name == "scontrol" else self._run(arguments, environment))

    def _control(self, arguments: list[str]) -> tuple[int, str]:
        if arguments[0] == "requeue":
            self.requeued.append(arguments[1])
            return 0, ""
        assert arguments == ["show", "hostnames", "nodes[1-2]"]
        return 0, "".join(f"{host.name}\n" for host in self.hosts)

    def _run(self, arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
        first = next(i for i, argument in enumerate(arguments) if not argument.startswith("--"))
        options = dict(option.removeprefix("--").split("=") for option in arguments[:first])
        chosen = [host for host in self.hosts if options.get("nodelist", host.name) == host.name]
        assert int(options["nodes"]) == int(options["ntasks"]) == len(chosen)
        if len(chosen) == 1:
            done = chosen[0].run(arguments[first:], environment)
            return done.status, done.out
        tasks = [host.start(arguments[first:], environment, self.folder / f"{host.name}.log") for host in chosen]
        return max(task.wait() for task in tasks), ""


@pytest.fixture
def slurm(network: Network, tmp_path: Path) -> Iterator[Slurm]:
    one = Slurm([network.add("node1"), network.add("node2")], tmp_path)
    yield one
    one.close()


def submit(slurm: Slurm, tmp_path: Path, dataset_dir: Path, steps: int) -> subprocess.Popen[str]:
    """The batch script, on the first node, as sbatch starts it."""
    state = tmp_path / "state"
    state.mkdir(exist_ok=True)
    settings = [f"run.storage={tmp_path}/runs", "run.name=batch", f"data.dir={dataset_dir}", f"train.steps={steps}"]
    settings += ["cluster.workers=2", "run.log_every_steps=5", "run.checkpoint_every_steps=100000"]
    environment = {**slurm.environment(), "VAE_DIST_STATE": str(state), "RAY_ADDRESS": ""}
    command = ["bash", str(ROOT / "cluster/slurm.sh"), *TINY, *settings]
    return slurm.hosts[0].start(command, environment, tmp_path / "batch.log")


def logs(tmp_path: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(tmp_path.glob("*.log")))


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_job_trains_on_two_nodes_saves_before_its_limit_and_goes_back_to_the_queue(
    slurm: Slurm, dataset_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs/batch"
    job = submit(slurm, tmp_path, dataset_dir, steps=100_000)
    wait_for(
        lambda: job.poll() is not None or records(run, "train"),
        200,
        lambda: logs(tmp_path),
    )
    assert job.poll() is None, logs(tmp_path)
    (state,) = (tmp_path / "state").glob(".vae_dist.*")
    assert state.stat().st_mode & 0o777 == 0o700 and (state / "token").stat().st_mode & 0o777 == 0o600
    for host in slurm.hosts:
        assert {address for address, port in host.listening() if port == 8265} <= {"127.0.0.1"}
    assert ("127.0.0.1", 8265) in slurm.hosts[0].listening()
    # As `--signal=B:USR1@300` does, five minutes before the end.
    send(job, signal.SIGUSR1)
    assert job.wait(timeout=120) == 0, logs(tmp_path)
    assert slurm.requeued == ["42"]
    (saved,) = (run / "checkpoints").iterdir()
    assert (saved / "manifest.json").exists()
    assert list((tmp_path / "state").glob(".vae_dist.*")) == [], "the token goes with the job"
    for host in slurm.hosts:
        assert host.run(["pgrep", "-x", "raylet"]).status == 1
    assert f"step-{records(run, 'checkpoint')[-1]['step']:08d}" == saved.name
