"""The text that the step is timed on."""

from __future__ import annotations

from pathlib import Path

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare_cached
from vae_dist.launch.prepare import executor


def prepare(data: Path, cache: Path) -> Path:
    """Penn Treebank with its 10,000 words where it is there, else the docstring corpus; prepared once."""
    if (data / "ptb").is_dir():
        source, options = str(data / "ptb"), PrepareConfig(recipe="lines", vocab_size=10_002)
    else:
        source, options = "docstrings", PrepareConfig(vocab_size=10_000)
    return Path(prepare_cached(source, options, cache / "data", run=executor())[1])
