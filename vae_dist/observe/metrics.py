"""The run's metrics: one JSON object a line in metrics.jsonl, mirrored to TensorBoard, read by everything else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records of kind `train`, `valid`, `checkpoint`, `fit` or `event`; rank 0 only."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        """Drop what an interrupted run wrote beyond the step it resumes from, then append."""
        path = run_dir / FILE
        if path.exists():
            kept = [r for r in read_metrics(run_dir) if r["step"] <= resume_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one record; numbers also go to TensorBoard under `kind/name`."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records so far; a last line cut off by a crash is left out."""
    path = run_dir / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class MetricsTail:
    """Reads what was appended to metrics.jsonl since the last look, wherever the file was shortened meanwhile."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE
        self._seen: set[str] = set()
        self._inode, self._offset = -1, 0

    def read_new(self) -> list[dict[str, Any]]:
        """Whole records not returned before."""
        try:
            with open(self._path, encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_ino != self._inode:
                    # A resumed run replaced the file: what it kept was shown already, what follows was not.
                    self._inode, self._offset = os.fstat(file.fileno()).st_ino, 0
                    known, self._seen = self._seen, set()
                else:
                    known = set()
                file.seek(self._offset)
                *lines, _ = file.read().split("\n")
        except FileNotFoundError:
            return []
        self._offset += sum(len(line.encode()) + 1 for line in lines)
        self._seen.update(lines)
        return [json.loads(line) for line in lines if line and line not in known]
