"""What commands print: progress and errors on standard error, results on standard output."""

from __future__ import annotations

import sys

from vae_dist.errors import VaeDistError


def say(message: str) -> None:
    """One line of progress."""
    print(message, file=sys.stderr, flush=True)


def fail(error: VaeDistError) -> int:
    """Print the user's message, without a traceback; returns the exit status."""
    say(f"error: {error.message}")
    return error.exit_status
