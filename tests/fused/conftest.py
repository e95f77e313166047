"""An uninstalled checkout finds its own kernels."""

import sys
from pathlib import Path

_KERNELS = str(Path(__file__).resolve().parents[2] / "kernels")
if _KERNELS not in sys.path:
    sys.path.insert(0, _KERNELS)
