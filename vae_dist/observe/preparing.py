"""How far a prepare is: a bar on a terminal, else a line in the log now and then."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

from vae_dist.observe.progress import format_seconds

if TYPE_CHECKING:
    from vae_dist.data.prepare.tasks import Progress

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


def show_preparing() -> Progress:
    """Progress for standard error as it is."""
    return Bar() if sys.stderr.isatty() else Lines()


class Lines:
    """Logs a line about every ten seconds; stages that take less say nothing."""

    def __init__(self) -> None:
        self._rate = Rate("", 0, 0)
        self._said_at = 0.0

    def begin(self, stage: str, total: int, done: int) -> None:
        """A stage of `total` units begins, of which `done` are done."""
        self._rate, self._said_at = Rate(stage, total, done), time.monotonic()

    def advance(self, done: int, texts: int) -> None:
        """A task of `done` units and so many texts has ended."""
        self._rate.advance(done, texts)
        if time.monotonic() - self._said_at >= _SECONDS_BETWEEN_LINES:
            self._said_at = time.monotonic()
            logger.info("%s", str(self._rate))

    def end(self) -> None:
        """The stage has ended."""


class Bar:
    """A bar for the stage under way; a line remains of each that is finished."""

    def __init__(self) -> None:
        self._rate = Rate("", 0, 0)

    def begin(self, stage: str, total: int, done: int) -> None:
        """A stage of `total` units begins, of which `done` are done."""
        # Imported here: where nobody looks, it is not needed.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._rate = Rate(stage, total, done)
        columns = (TextColumn("{task.description:<13}"), BarColumn(), TextColumn("{task.fields[facts]}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._task = self._bar.add_task(stage, total=total, completed=done, facts=self._rate.facts)
        self._bar.start()

    def advance(self, done: int, texts: int) -> None:
        """A task of `done` units and so many texts has ended."""
        self._rate.advance(done, texts)
        self._bar.update(self._task, advance=done, facts=self._rate.facts)

    def end(self) -> None:
        """The stage has ended."""
        self._bar.stop()


class Rate:
    """How fast a stage goes, and how long it will take."""

    def __init__(self, stage: str, total: int, done: int) -> None:
        """
        Args:
            total, done: in any unit; what is done already says nothing about the speed.
        """
        self._stage, self._total, self._done = stage, total, done
        self._done_now = self._texts = 0
        self._begun_at = time.monotonic()

    def advance(self, done: int, texts: int) -> None:
        """So much more is done."""
        self._done_now += done
        self._texts += texts

    @property
    def facts(self) -> str:
        """Share, rows a second, time left."""
        share = (self._done + self._done_now) / max(1, self._total)
        seconds = time.monotonic() - self._begun_at
        parts = [f"{100 * share:3.0f} %"]
        if self._texts and seconds:
            parts.append(f"{self._texts / seconds:,.0f} rows/s")
        if self._done_now and seconds:
            left = (self._total - self._done - self._done_now) * seconds / self._done_now
            parts.append(f"left {format_seconds(left)}")
        return "  ".join(parts)

    def __str__(self) -> str:
        return f"{self._stage:<13}{self.facts}"
