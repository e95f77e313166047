"""vae_dist: pretrain text VAEs on a cluster and sample from them in production."""

import sys
from pathlib import Path

__version__ = "0.1.0"

# An uninstalled checkout (git clone, or `ray job submit --working-dir .`) finds its own kernels beside
# it, ahead of an older installed wheel; an installed wheel has no such folder and is left alone.
_kernels = Path(__file__).resolve().parent.parent / "kernels"
if (_kernels / "vae_kernels" / "__init__.py").exists() and str(_kernels) not in sys.path:
    sys.path.insert(0, str(_kernels))
