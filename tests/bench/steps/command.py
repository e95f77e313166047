"""What the benchmarks of the training step share on the command line, and the process they run in."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from vae_dist.launch.trainer import MALLOC

_ROOT = Path(__file__).resolve().parents[3]


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """--data and --cache."""
    folder = Path(os.environ.get("VAE_DIST_DATA", _ROOT / "../shared/data"))
    text = "folder with ptb (default $VAE_DIST_DATA); without it docstrings are read"
    parser.add_argument("--data", type=Path, default=folder, help=text)
    parser.add_argument("--cache", type=Path, default=_ROOT / ".bench", help="where prepared corpora are kept")


def run_like_a_worker(main: Callable[[], int]) -> None:
    """End the process with `main`'s status, under the allocator's settings of workers on CPUs."""
    # The allocator reads them when the process starts.
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    sys.exit(main())
