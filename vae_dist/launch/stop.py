"""Asking a run to stop: a signal to the driver sets a flag that the workers see at their next step.

Ray ends a driver on SIGTERM and aborts a training on SIGINT, without a checkpoint in either case, so the
driver's main thread owns both signals while `fit` runs in another thread.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray

_POLL_SECONDS = 0.5


@ray.remote(num_cpus=0)
class StopFlag:
    """A boolean that every worker can read."""

    def __init__(self) -> None:
        self._raised = False

    def set(self) -> None:
        self._raised = True

    def is_set(self) -> bool:
        return self._raised


class StopPoller:
    """Reads the flag in a background thread, so that a step costs no round trip to the actor."""

    def __init__(self, flag: Any) -> None:
        self._flag, self._raised = flag, False
        threading.Thread(target=self._poll, name="stop-poller", daemon=True).start()

    def __call__(self) -> bool:
        return self._raised

    def _poll(self) -> None:
        while not self._raised:
            try:
                self._raised = ray.get(self._flag.is_set.remote())
            except ray.exceptions.RayError:
                # The driver that owns the flag is gone; Ray ends this worker too.
                return
            time.sleep(_POLL_SECONDS)


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
