"""Hosts on one machine, for tests of real clusters: needs root, `ip` and `unshare`.

A host is a network namespace with an address of its own on a bridge, and a process namespace, so that it can lose its
network, be slow, or die whole. It has its own hostname, /tmp/ray and /dev/shm; the rest of the file system is shared,
as an NFS mount would be. Its name points to 127.0.1.1, as Debian and Ubuntu set it up.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import pytest
from support import ROOT, Finished

INTERFACE = "net0"
_SETUP = """
set -e
mount --bind "$1" /etc/hosts
mount -t tmpfs tmpfs /tmp/ray
mount -t tmpfs tmpfs /dev/shm
hostname "$0"
ip link set lo up
echo ready
# As process 1 this shell also collects what its host leaves behind.
sleep infinity &
wait
"""


class Host:
    """One host: start processes on it, and do to it what happens to machines."""

    def __init__(self, network: Network, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._namespace, self._port, self._switch = f"{network.prefix}{name}", f"to-{name}", network.switch
        _ip("netns", "add", self._namespace)
        _ip("-n", self._switch, "link", "add", self._port, "type", "veth", "peer", INTERFACE, "netns", self._namespace)
        _ip("-n", self._switch, "link", "set", self._port, "master", "bridge", "up")
        _ip("-n", self._namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
        _ip("-n", self._namespace, "link", "set", INTERFACE, "up")
        names = network.folder / f"hosts-{name}"
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        # Ray's default folder: each host gets its own there.
        Path("/tmp/ray").mkdir(exist_ok=True)
        apart = ["unshare", "--pid", "--fork", "--mount-proc", "--uts", "--kill-child=KILL"]
        command = ["ip", "netns", "exec", self._namespace, *apart, "bash", "-c", _SETUP, name, str(names)]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError(self._holder.stderr.read())
        (self.init,) = _children(self._holder.pid)

    def start(
        self, command: list[str], environment: dict[str, str] | None = None, log: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a command in the repository on this host; its output goes to a file or to pipes."""
        enter = ["nsenter", "--target", str(self.init), "--net", "--pid", "--mount", "--uts", f"--wd={ROOT}"]
        out = open(log, "w") if log else subprocess.PIPE  # noqa: SIM115 - the process has it
        return subprocess.Popen(
            [*enter, *command],
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **(environment or {})},
            stdout=out,
            stderr=subprocess.STDOUT if log else subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, command: list[str], environment: dict[str, str] | None = None, timeout: float = 60) -> Finished:
        """Run a command on this host to its end."""
        process = self.start(command, environment)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            send(process, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"{command} on {self.name} took longer than {timeout} s\n{out}\n{err}")
        return Finished(process.returncode, out, err)

    def cut_off(self) -> None:
        """Nothing reaches the host or leaves it any more; nobody is told."""
        _ip("-n", self._switch, "link", "set", self._port, "nomaster")

    def reconnect(self) -> None:
        """Undo `cut_off`."""
        _ip("-n", self._switch, "link", "set", self._port, "master", "bridge")

    def slow(self, rate: str) -> None:
        """Limit what the host sends, such as to `20mbit`."""
        limit = ["tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
        _run("ip", "netns", "exec", self._namespace, "tc", "qdisc", "replace", "dev", INTERFACE, "root", *limit)

    def delay(self, milliseconds: int) -> None:
        """Delay what the host sends. Skips the test on a kernel without netem."""
        late = ["netem", "delay", f"{milliseconds}ms"]
        command = ["ip", "netns", "exec", self._namespace, "tc", "qdisc", "replace", "dev", INTERFACE, "root", *late]
        done = subprocess.run(command, capture_output=True, text=True)
        if "kind is unknown" in done.stderr:
            pytest.skip("this kernel has no netem")
        assert done.returncode == 0, done.stderr

    def kill(self) -> None:
        """Power off: every process of the host is killed at once."""
        if self._holder.poll() is None:
            os.kill(self.init, signal.SIGKILL)
            self._holder.wait(timeout=20)

    def remove(self) -> None:
        """Kill it and take its network away."""
        self.kill()
        subprocess.run(["ip", "netns", "delete", self._namespace], capture_output=True)

    def listening(self) -> set[tuple[str, int]]:
        """(address, port) of its listening IPv4 and IPv6 TCP sockets; `*` is every address."""
        rows = self.run(["ss", "--no-header", "--tcp", "--listening", "--numeric"]).out.splitlines()
        ends = [row.split()[3].rpartition(":") for row in rows]
        names = {"0.0.0.0": "*", "[::]": "*"}
        return {(names.get(at, at.strip("[]").removeprefix("::ffff:")), int(port)) for at, _, port in ends}


class Network:
    """A bridge and its hosts, addresses 10.77.0.1 and on; all of it goes with the `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"vd{os.getpid()}-"
        self.switch = f"{self.prefix}switch"
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        tools = [tool for tool in ("ip", "unshare", "nsenter", "tc", "ss") if not shutil.which(tool)]
        if os.geteuid() != 0 or tools:
            pytest.skip(f"hosts need root{f' and {tools}' if tools else ''}")
        try:
            _ip("netns", "add", self.switch)
            _ip("-n", self.switch, "link", "add", "bridge", "up", "type", "bridge")
        except RuntimeError as error:
            pytest.skip(f"hosts need network namespaces: {error}")
        return self

    def __exit__(self, *exception: object) -> None:
        for host in self.hosts:
            host.remove()
        subprocess.run(["ip", "netns", "delete", self.switch], capture_output=True)

    def add(self, name: str) -> Host:
        """A new host."""
        self.hosts.append(Host(self, name, f"10.77.0.{len(self.hosts) + 1}"))
        return self.hosts[-1]


def send(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to a command that `Host.start` started: `nsenter` is its parent and passes none on."""
    for child in _children(process.pid):
        os.kill(child, number)


def end(process: subprocess.Popen[str], seconds: float = 20) -> None:
    """SIGTERM, and SIGKILL when that is not enough."""
    send(process, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    send(process, signal.SIGKILL)
    process.wait(timeout=10)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
