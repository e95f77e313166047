"""The text that the step is timed on."""

from __future__ import annotations

from pathlib import Path

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare_cached
from vae_dist.launch.prepare import executor


def prepare(data: Path, cache: Path, vocab_size: int = 10_002) -> Path:
    """Penn Treebank with its 10,000 words where it is there, else the docstring corpus; prepared once."""
    if (data / "ptb").is_dir():
        source, options = str(data / "ptb"), PrepareConfig(recipe="lines", vocab_size=vocab_size)
    else:
        source, options = "docstrings", PrepareConfig(vocab_size=vocab_size)
    return Path(prepare_cached(source, options, cache / "data", run=executor())[1])


def prepare_copies(data: Path, cache: Path, copies: int) -> Path:
    """The training sentences of Penn Treebank so many times over, in one data set.

    Raises:
        FileNotFoundError: Penn Treebank is not there.
    """
    text = (data / "ptb" / "train.txt").read_bytes()
    source = cache / "copies" / f"{copies}.txt"
    source.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists() or source.stat().st_size != copies * len(text):
        source.write_bytes(copies * text)
    options = PrepareConfig(recipe="lines", vocab_size=10_002, valid_fraction=0.0, test_fraction=0.0)
    return Path(prepare_cached(str(source), options, cache / "data", run=executor())[1])
