"""Which sequences a run was trained on: a line a step and rank, written after the step."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np
import xxhash

from vae_dist.data.stream.batch import Share


class Ledger:
    """Appends to `ledger/rank-00000-of-00002.jsonl`: {"step": 7, "position": [...], "xxh3_64": [...]}.

    A step made again after a restart is there again, with the same sequences over all ranks. `position` is that in the
    run's global order, epoch after epoch; the hash is of the tokens as int64, little-endian.
    """

    def __init__(self, run_dir: Path, rank: int, world: int) -> None:
        folder = run_dir / "ledger"
        folder.mkdir(exist_ok=True)
        path = folder / f"rank-{rank:05d}-of-{world:05d}.jsonl"
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - lives as long as the run
        if path.stat().st_size:
            # What a killed process left of a line must not run into the next one. Looked for from the end: after
            # weeks the file is large.
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as written:
                whole = written.rfind(b"\n") + 1
            self._file.truncate(whole)

    def write(self, step: int, share: Share) -> None:
        """Note the sequences of a step that was made."""
        hashes = [xxhash.xxh3_64_hexdigest(np.asarray(ids, "<i8").tobytes()) for ids in share.sequences]
        line = {"step": step, "position": share.sample_id.tolist(), "xxh3_64": hashes}
        self._file.write(json.dumps(line).encode() + b"\n")
