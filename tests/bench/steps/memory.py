"""Memory that a contender needs beyond what the process has before it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steps.turn import take_turn

_STEPS = 6


def peak_mebibytes(build: Callable[[], Any], steps: int = _STEPS) -> float:
    """Highest resident memory while the contender is built and makes a few steps, less what is there before, MiB."""
    before = _status("VmRSS")
    # From here on the kernel counts the peak anew.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    take_turn(build().step, 0.0, steps)
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, f"the kernel does not say {field}"
    return int(found[1])
