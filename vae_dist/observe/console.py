"""What commands print: progress and errors on standard error, results on standard output."""

from __future__ import annotations

import logging
import sys

from vae_dist.config.credentials import without_credentials
from vae_dist.errors import VaeDistError

# What a shell reports for a command ended by Ctrl-C.
INTERRUPTED = 130


def show_log() -> None:
    """Send what this package logs (progress of long steps, what was skipped) to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    log = logging.getLogger("vae_dist")
    log.setLevel(logging.INFO)
    log.handlers = [handler]


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def say(message: str) -> None:
    """One line of progress; credentials in URLs are left out."""
    print(without_credentials(message), file=sys.stderr, flush=True)


def fail(error: VaeDistError) -> int:
    """Print the user's message, without a traceback; returns the exit status."""
    say(f"error: {error.message}")
    return error.exit_status
