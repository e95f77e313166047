"""Ray Data reads our shards without knowing us. Stock webdataset does so in tests/unit/test_shards.py."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from support import run_command

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare

# A process of its own: `ray.init` changes the environment of the process that calls it.
_SCRIPT = """
import json, sys
import pyarrow as pa
import ray

def decode(sample):
    table = pa.ipc.open_stream(sample["arrow"]).read_all()
    return {"key": sample["__key__"], **table.to_pydict()}

temporary, *shards = sys.argv[1:]
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, _temp_dir=temporary)
rows = ray.data.read_webdataset(shards, decoder=decode).take_all()
rows = [[str(row["key"]), [list(map(int, t)) for t in row["tokens"]], list(map(int, row["doc"]))] for row in rows]
ray.shutdown()
print(json.dumps(sorted(rows)))
"""


@pytest.mark.long
def test_ray_data_reads_shards(tmp_path: Path) -> None:
    lines = [" ".join([f"n{i}", *["word"] * (i % 9)]) for i in range(300)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    options = PrepareConfig(
        tokenizer="word", member_sequences=20, shard_bytes=8192, valid_fraction=0.0, test_fraction=0.0
    )
    dataset = prepare(str(tmp_path / "corpus.txt"), tmp_path / "out", options)
    split = dataset.split("train")
    shards = sorted(map(str, (tmp_path / "out").glob("train-*.tar")))
    assert len(shards) > 1
    rows = _read_with_ray(shards)
    assert len({key for key, _, _ in rows}) == len(rows) == 15
    assert [ids for _, tokens, _ in rows for ids in tokens] == [ids.tolist() for ids in split.read(0, 300)]
    assert [number for _, _, docs in rows for number in docs] == list(range(300))


def _read_with_ray(shards: list[str]) -> list[tuple[str, list[list[int]], list[int]]]:
    # Unix socket paths must be short, which pytest's folders are not.
    temporary = tempfile.mkdtemp(prefix="vae-ray-")
    # A cluster of this process alone: no token is made, and none is written to the user's home.
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    try:
        done = run_command([sys.executable, "-c", _SCRIPT, temporary, *shards], environment)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if done.status:
        pytest.fail(f"{os.fspath(sys.executable)} ended with status {done.status}\n{done.err[-4000:]}")
    return [tuple(row) for row in json.loads(done.out.strip().splitlines()[-1])]
