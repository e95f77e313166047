"""Processes that train together and wait for their turn."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from steps.turn import take_turn

_TRIED_STEPS = 3


class Team:
    """The ranks of one run, each started with `command`; a context manager that ends them."""

    def __init__(self, command: Sequence[str], ranks: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._members = [self._start(command, rank, ranks, port) for rank in range(ranks)]
        self._answers()  # that they are ready

    def turn(self) -> float:
        """Tokens per second of all of them together in one turn."""
        for member in self._members:
            assert member.stdin is not None
            member.stdin.write("go\n")
            member.stdin.flush()
        return sum(map(float, self._answers()))

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: Any) -> None:
        for member in self._members:
            member.communicate()

    def _start(self, command: Sequence[str], rank: int, ranks: int, port: int) -> subprocess.Popen[str]:
        places = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = os.environ | {name: str(value) for name, value in places.items()}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def _answers(self) -> list[str]:
        found = []
        for member in self._members:
            assert member.stdout is not None
            for line in member.stdout:
                if line.startswith("answer "):
                    found.append(line.split()[1])
                    break
            else:
                raise RuntimeError(f"a member of the team ended with status {member.wait()}")
        return found


def obey(step: Callable[[], int], seconds: float) -> None:
    """In a member: a turn of about so long for each line of standard input, of as many steps in all members."""
    tried = take_turn(step, 0.0, _TRIED_STEPS)
    steps = torch.tensor(max(1, round(seconds * tried.steps / tried.seconds)))
    dist.all_reduce(steps, op=dist.ReduceOp.MIN)
    print("answer ready", flush=True)
    for _ in sys.stdin:
        print(f"answer {take_turn(step, 0.0, int(steps)).tokens_per_second}", flush=True)
