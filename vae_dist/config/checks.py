"""Checks across fields: each names the two values that clash and the change that mends them.

Those of the model and its training are in `science_checks.py`.
"""

from __future__ import annotations

from vae_dist.config.schema import Config, PrepareConfig
from vae_dist.config.science_checks import science_problems

# Records that files of a format can be cut into; the texts of all other formats are whole.
_RECORDS_OF_FORMAT = {"text": ("line", "paragraph", "sentence"), "wikitext": ("line", "sentence", "document")}


def cross_field_problems(config: Config) -> list[str]:
    """Every combination in `config` that cannot work, as messages; empty when there is none."""
    return [
        *_data_problems(config),
        *_batch_problems(config),
        *science_problems(config),
        *_length_problems(config),
        *_storage_problems(config),
    ]


def record_problem(format: str, record: str) -> str | None:
    """Why texts of a format cannot be cut into such records, or None."""
    records = _RECORDS_OF_FORMAT.get(format, ("line",))
    if record in records:
        return None
    fitting = [kind for kind, records in _RECORDS_OF_FORMAT.items() if record in records]
    return (
        f"prepare.record = {record} does not go with prepare.format = {format}. Use record: {' or '.join(records)}, or "
        f"format: {' or '.join(fitting)}."
    )


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` closest to `wanted` (the smaller one on a tie)."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def worker_problem(workers: int, streams: int) -> str | None:
    """Why `workers` cannot share `streams` canonical streams, or None."""
    if streams % workers == 0:
        return None
    return (
        f"{workers} workers cannot share data.streams = {streams} evenly. Use "
        f"cluster.workers={nearest_divisor(streams, workers)}, or a data.streams that is a multiple of {workers}."
    )


def fraction_problem(prepare: PrepareConfig) -> str | None:
    """Why the fractions that are held out cannot be, or None."""
    held_out = prepare.valid_fraction + prepare.test_fraction
    if held_out < 1.0:
        return None
    return (
        f"prepare.valid_fraction + test_fraction = {held_out:g} leaves nothing to train on. Make their sum smaller "
        "than 1."
    )


def _data_problems(config: Config) -> list[str]:
    problems = []
    prepare = config.data.prepare
    problem = fraction_problem(prepare)
    problems += [f"data.{problem}"] if problem else []
    if config.data.dir is not None and config.data.mixture is not None:
        problems.append(
            f"data.dir = {config.data.dir} and data.mixture are two answers to what is trained on. Give one; in a "
            "mixture the first data set is the one that is validated on."
        )
    # What `auto` and `docstrings` stand for is known when the source is opened.
    if config.data.dir is None and config.data.mixture is None and prepare.format not in ("auto", "docstrings"):
        problem = record_problem(prepare.format, prepare.record)
        problems += [f"data.{problem}"] if problem else []
    return problems


def _batch_problems(config: Config) -> list[str]:
    problems = []
    batch, streams = config.train.batch_sequences, config.data.streams
    if batch % streams:
        below = batch - batch % streams
        nearest = f"{below} or {below + streams}" if below else str(streams)
        problems.append(
            f"train.batch_sequences = {batch} is not a multiple of data.streams = {streams}. "
            f"Use train.batch_sequences={nearest}, or data.streams={nearest_divisor(batch, streams)}."
        )
    if config.cluster.workers is not None:
        problem = worker_problem(config.cluster.workers, streams)
        problems += [problem] if problem else []
        if config.cluster.min_workers and config.cluster.min_workers > config.cluster.workers:
            problems.append(
                f"cluster.min_workers = {config.cluster.min_workers} is more than cluster.workers = "
                f"{config.cluster.workers}. Lower it to that or less."
            )
    return problems


def _length_problems(config: Config) -> list[str]:
    problems = []
    budget = config.train.micro_batch_tokens
    if budget is not None and config.data.dir is None and budget < config.data.prepare.max_tokens:
        problems.append(
            f"train.micro_batch_tokens = {budget} cannot hold one sequence of data.prepare.max_tokens = "
            f"{config.data.prepare.max_tokens}. Raise the first or lower the second."
        )
    return problems


def _storage_problems(config: Config) -> list[str]:
    problems, url = [], config.run.checkpoint_url
    if "://" in config.run.storage:
        problems.append(
            f"run.storage = {config.run.storage} is a URL; runs need a file system. Mount it, or give a directory."
        )
    if url is not None and ("://" not in url or (url.startswith("file://") and not url.startswith("file:///"))):
        problems.append(
            f"run.checkpoint_url = {url!r} is no whole URL. Give one such as s3://bucket/folder, or file:///folder for "
            "a directory that all nodes share; null keeps checkpoints in the run directory."
        )
    return problems
