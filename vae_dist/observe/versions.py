"""Versions of what decides the numbers of a run."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("torch", "deepspeed", "ray", "webdataset", "triton", "pyarrow", "tokenizers")


def versions() -> dict[str, str]:
    """Python, this package, and the pinned packages."""
    from vae_dist import __version__

    found = {"vae_dist": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
