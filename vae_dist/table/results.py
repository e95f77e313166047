"""What a table has come to so far: NAME.json beside the table file, and for each row how its numbers came about.

NAME.json                               a list of rows, in the table's order
NAME/METHOD-seedS/resolved.yaml         the run's configuration, without this machine's places
NAME/METHOD-seedS/valid.jsonl           its validations
NAME/METHOD-seedS/texts.json            samples, reconstructions and interpolations, where the table asks for texts
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vae_dist.config.load import dump_yaml, load_config
from vae_dist.errors import ConfigError, DataError
from vae_dist.observe.metrics import read_metrics
from vae_dist.table.jobs import Job, Table
from vae_dist.table.same import differences, neutral

_NEEDED = {"method", "seed", "split", "importance_samples"}


class Results:
    """The results of a table; several commands may work on one table at a time."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.path = table.path.with_name(f"{table.name}.json")
        self._folder = table.path.with_name(table.name)

    def find(self, job: Job) -> dict[str, Any] | None:
        """The row of a job, as last written by anyone, stale or not."""
        return next((row for row in self._read() if _key(row) == (job.row.method, job.seed)), None)

    def changes(self, job: Job, row: dict[str, Any]) -> list[str]:
        """What differs between the configuration that gave `row` and the table's; empty when nothing does."""
        evaluation = self._table.definition.evaluation
        samples = evaluation.importance_samples if job.has_latent else 0
        wanted = {"split": evaluation.split, "importance_samples": samples}
        changed = [f"{key} was {row[key]!r} and is now {now!r}" for key, now in wanted.items() if row[key] != now]
        try:
            return changed + differences(load_config(self._folder / job.folder / "resolved.yaml"), job.config)
        except ConfigError as error:
            # It was deleted, or is of a schema that is no more.
            return [error.message]

    def texts(self, job: Job) -> dict[str, Any] | None:
        """What the model of a job wrote, where the table asks for texts."""
        path = self._folder / job.folder / "texts.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def record(self, job: Job, row: dict[str, Any], texts: dict[str, Any] | None = None) -> None:
        """Write a row and what explains it; replaces an older row of this job."""
        config = neutral(load_config(job.run_dir / "resolved.yaml"))
        records = [_plain(r) for r in read_metrics(job.run_dir) if r["kind"] == "valid"]
        folder = self._folder / job.folder
        with self._claimed():
            others = [other for other in self._read() if _key(other) != _key(row)]
            # An older row must not be seen beside the configuration of this one.
            self._write(others)
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / "resolved.yaml", dump_yaml(config))
            _replace(folder / "valid.jsonl", "".join(json.dumps(r) + "\n" for r in records))
            if texts is not None:
                _replace(folder / "texts.json", json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
            self._write([*others, row])

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            rows: list[dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))
            # Of a file that a merge left half right, too.
            if all(row.keys() >= _NEEDED for row in rows):
                return rows
            raise ValueError
        except (ValueError, AttributeError, TypeError):
            raise DataError(
                f"{self.path} is not readable as the rows of a table. Restore it from version control; without it "
                "every row counts as not done."
            ) from None

    def _write(self, rows: list[dict[str, Any]]) -> None:
        order = {(job.row.method, job.seed): place for place, job in enumerate(self._table.jobs)}
        rows = sorted(rows, key=lambda row: order.get(_key(row), len(order)))
        _replace(self.path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """One writer at a time: the table file itself is the lock, so that none is left lying."""
        with open(self._table.path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _key(row: dict[str, Any]) -> tuple[str, int]:
    return row["method"], row["seed"]


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers only, to six digits: texts may name a machine, and nothing shows a seventh digit."""
    numbers = {name: value for name, value in record.items() if not isinstance(value, str)}
    short: dict[str, Any] = json.loads(json.dumps(numbers), parse_float=lambda text: float(f"{float(text):.6g}"))
    return short


def _replace(path: Path, text: str) -> None:
    # Two commands may write at a time, but not the same file: `record` is claimed.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
