"""An uninstalled checkout finds its own kernels, and the Triton suites find the test files whose cases they share."""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
for _folder in (_HERE, _HERE.parents[1] / "kernels"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
