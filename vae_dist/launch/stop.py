"""Asking a run to stop: a signal to the driver sets a flag that the workers see at their next step.

Ray ends a driver on SIGTERM, and SIGINT would break off its wait for the workers, without a checkpoint in either case,
so the driver's main thread owns both signals while another thread waits for the workers.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_POLL_SECONDS = 0.5


@ray.remote(num_cpus=0)
class StopFlag:
    """A boolean that every worker can read; it knows on which nodes they are, and what they want to be heard."""

    def __init__(self) -> None:
        self._raised, self._nodes, self._told = False, set[str](), list[str]()

    def put_up(self) -> None:
        """Ask all workers to save and end."""
        self._raised = True

    def is_up(self, node: str) -> bool:
        """Asked by a worker on `node`."""
        self._nodes.add(node)
        return self._raised

    def tell(self, message: str) -> None:
        """A message for the driver."""
        self._told.append(message)

    def news(self) -> tuple[set[str], list[str]]:
        """The nodes, and what was told since this was asked last."""
        told, self._told = self._told, []
        return self._nodes, told


def new_stop_flag() -> Any:
    """A flag on the driver's own node: it must not go with a node that is lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return StopFlag.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class StopPoller:
    """Reads the flag in a background thread, so that a step costs no round trip to the actor."""

    def __init__(self, flag: Any) -> None:
        self._flag, self._raised = flag, False
        threading.Thread(target=self._poll, name="stop-poller", daemon=True).start()

    def __call__(self) -> bool:
        """Whether the flag was up when it was last read."""
        return self._raised

    def _poll(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        while not self._raised:
            try:
                self._raised = ray.get(self._flag.is_up.remote(node))
            except ray.exceptions.RayError:
                # The driver that owns the flag is gone; Ray ends this worker too.
                return
            time.sleep(_POLL_SECONDS)


class ToDriver(logging.Handler):
    """Passes a worker's warnings to the driver: standard error of a worker is a file that few people open."""

    def __init__(self, flag: Any) -> None:
        super().__init__(logging.WARNING)
        self._flag = flag

    def emit(self, record: logging.LogRecord) -> None:
        """Told to the driver, with the host."""
        self._flag.tell.remote(f"warning: {record.getMessage()} (on {socket.gethostname()})")


@contextmanager
def signals_to(on_stop: Callable[[], None]) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM call `on_stop`; a second one is handled as before. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.getsignal(name) for name in names}

    def restore() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        on_stop()

    for name in names:
        signal.signal(name, handle)
    try:
        yield
    finally:
        restore()
