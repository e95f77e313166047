"""The run's metrics: one JSON object a line in metrics.jsonl, mirrored to TensorBoard, read by everything else."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_dist.observe.sinks import SINKS

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records of kind `train`, `valid`, `checkpoint`, `fit`, `time` or `event`; rank 0 only."""

    def __init__(self, run_dir: Path, resume_step: int, sinks: Sequence[str] = ()) -> None:
        """Drop what an interrupted run wrote beyond the step it resumes from, then append."""
        path = run_dir / FILE
        if path.exists():
            kept = [r for r in read_metrics(run_dir) if r["step"] <= resume_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._lock = threading.Lock()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run
        self._unwritten, self._has_warned = bytearray(), False
        self._board_dir = str(run_dir / "tensorboard")
        purge = resume_step + 1 if resume_step else None
        self._board: Any = _summary_writer(self._board_dir, purge)
        self._sinks = [SINKS[name](run_dir) for name in sinks]

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one record; numbers also go to TensorBoard and sinks under `kind/name`. Any thread may call.

        While the storage takes nothing, records wait in memory; TensorBoard, which shows what is in them, goes without.
        """
        with self._lock:
            self._unwritten += (json.dumps({"kind": kind, "step": step, **values}) + "\n").encode()
            try:
                self._write_lines()
                self._show(kind, step, values)
                self._has_warned = False
            except OSError as error:
                self._warn(error)

    def close(self) -> None:
        """Write what waits and close both files.

        Raises:
            OSError: the storage takes nothing.
        """
        with self._lock:
            self._write_lines()
            self._file.close()
            if self._board:
                self._board.close()
            for sink in self._sinks:
                sink.close()

    def _write_lines(self) -> None:
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]

    def _show(self, kind: str, step: int, values: dict[str, Any]) -> None:
        # A writer that met an error once raises it for ever.
        board, self._board = self._board or _summary_writer(self._board_dir, None), None
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name, value in numbers.items():
            board.add_scalar(name, value, step)
        self._board = board
        for sink in self._sinks if numbers else ():
            sink.write(step, numbers)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            logger.warning("metrics wait in memory: %s: %s", self._file.name, error)
        self._has_warned = True


def _summary_writer(folder: str, purge_step: int | None) -> Any:
    # The import takes half a second, which neither the driver nor the other ranks need to spend.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=purge_step)


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
