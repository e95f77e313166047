"""A contender's process, as the conductor sees it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from peers.contract import CONTENDERS

_BENCH, _ROOT = Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[3]
_LOG_CHARACTERS, _CLOSE_SECONDS = 600, 60.0


class ContenderError(Exception):
    """A contender cannot take part; says why."""


class NotInstalledError(ContenderError):
    """The contender's packages are missing; says how to install them."""


class Process:
    """One contender, pinned to one core, stopped with all its processes while it is not asked anything.

    Read-ahead, polling and daemons would else run on in the turns of the others.

    Attributes:
        versions: of the packages it stands for.
    """

    def __init__(
        self, name: str, corpus: Path, cache: Path, core: int, batch_sequences: int, *, is_altered: bool
    ) -> None:
        """Start it and wait until it has made its format and opened the corpus.

        Raises:
            NotInstalledError: its environment or its packages are missing.
            ContenderError: it failed otherwise.
        """
        python = _python(name, cache)
        (cache / "logs").mkdir(exist_ok=True)
        self._name, self._log = name, cache / "logs" / f"{name}.log"
        command = ["taskset", "--cpu-list", str(core), python, "-m", "peers.contender", name, str(corpus)]
        command += [str(batch_sequences), *(["--sabotage"] if is_altered else [])]
        # Not the caller's folder: what lies there would be imported first.
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=cache / "logs",
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in: IO[str] = self._process.stdin
        self._out: IO[str] = self._process.stdout
        opened = self._answer()
        if "missing" in opened:
            self.close()
            raise NotInstalledError(f"{opened['missing']}; {_how_to_install(name)}")
        self.versions: dict[str, str] = opened["versions"]
        _signal(self._process.pid, signal.SIGSTOP)

    def ask(self, command: str) -> dict[str, Any]:
        """Send a line and wait for its answer.

        Raises:
            ContenderError: it has died.
        """
        _signal(self._process.pid, signal.SIGCONT)
        # When it is dead, what it said last is in its log.
        with contextlib.suppress(BrokenPipeError):
            self._in.write(f"{command}\n")
            self._in.flush()
        answer = self._answer()
        _signal(self._process.pid, signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End the process; its own shutdown ends what it started."""
        _signal(self._process.pid, signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()

    def _answer(self) -> dict[str, Any]:
        line = self._out.readline()
        if not line:
            status = self._process.wait()
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-_LOG_CHARACTERS:].strip()
            raise ContenderError(f"ended with status {status}; {self._log} ends in\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _signal(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and all that descend from it, parents first."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, number)
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="ascii").split():
                _signal(int(child), number)


def _python(name: str, cache: Path) -> str:
    environment = CONTENDERS[name].environment
    if environment == "project":
        return sys.executable
    python = cache / environment / "bin" / "python"
    if not python.exists():
        raise NotInstalledError(f"there is no {python}; {_how_to_install(name)}")
    return str(python)


def _how_to_install(name: str) -> str:
    return "run `make install`" if CONTENDERS[name].environment == "project" else "run `make bench-peers`"


def _environment() -> dict[str, str]:
    # One core: pools of threads would only take it from each other. A token for the Ray that a contender starts:
    # without one Ray makes one in the user's home.
    return {
        **os.environ,
        "PYTHONPATH": f"{_BENCH}{os.pathsep}{_ROOT}",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
