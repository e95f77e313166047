"""Further nodes of the session's cluster, to drain and to kill."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from support import RayCluster, free_port, wait_for


class Node:
    """A Ray node with a raylet of its own on this machine."""

    def __init__(self, cluster: RayCluster, cpus: int, log: Path) -> None:
        address = cluster.environment["RAY_ADDRESS"]
        start = ["ray", "start", f"--address={address}", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--block"]
        start += ["--object-store-memory=100000000", "--disable-usage-stats", "--min-worker-port=0"]
        start += ["--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        environment = {**os.environ, **cluster.environment, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "30"}
        environment.pop("RAY_ADDRESS")
        self._out = open(log, "w")  # noqa: SIM115 - lives as long as the node
        self.process = subprocess.Popen(
            start, env=environment, stdout=self._out, stderr=subprocess.STDOUT, start_new_session=True
        )
        wait_for(lambda: "Ray runtime started" in log.read_text(), 60, lambda: log.read_text())

    def drain(self) -> None:
        """What a machine that is about to stop does."""
        self.process.send_signal(signal.SIGTERM)

    def kill_raylet(self) -> None:
        """The node is gone, without a word."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid), "raylet"], capture_output=True, text=True)
        os.kill(int(found.stdout), signal.SIGKILL)

    def end(self) -> None:
        """Kill all of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=20)
        self._out.close()
