"""Preparing data on a Ray cluster: the bytes of a prepare on one machine, errors as themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import Finished, RayCluster, run_command, write_repeated_corpus

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare

SCRIPT = """
import sys
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.launch.prepare import executor
from vae_dist.errors import VaeDistError
from vae_dist.observe.console import fail, show_log
show_log()
source, out, options = sys.argv[1:]
try:
    prepare(source, out, PrepareConfig.model_validate_json(options), run=executor(), group_bytes=40_000)
except VaeDistError as error:
    sys.exit(fail(error))
import ray
print(ray.is_initialized())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """4,500 sentences, the first half twice."""
    return write_repeated_corpus(tmp_path_factory.mktemp("source"), 2000)


def on_ray(cluster: RayCluster, source: str, out: Path, options: PrepareConfig) -> Finished:
    command = [sys.executable, "-c", SCRIPT, source, str(out), options.model_dump_json()]
    return run_command(command, cluster.environment, timeout=120)


@pytest.mark.long
def test_ray_gives_the_bytes_of_one_process(ray_cluster: RayCluster, source: str, tmp_path: Path) -> None:
    options = PrepareConfig(deduplicate="exact", max_tokens=16, member_sequences=100, shard_bytes=65_536)
    done = on_ray(ray_cluster, source, tmp_path / "ray", options)
    assert done.status == 0, done.err
    assert done.out.strip() == "True"
    prepare(source, tmp_path / "here", options)
    written = {path.name: path.read_bytes() for path in (tmp_path / "ray").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    assert len(written) > 6
    assert json.loads(written["manifest.json"])["duplicate_texts"] == 2000
    # Of Ray Data nothing is seen.
    assert not [line for line in done.err.splitlines() if "dataset" in line.lower() or "WARN" in line], done.err


def test_an_error_in_a_task_is_one_message(ray_cluster: RayCluster, source: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.txt"
    broken.write_bytes(Path(source).read_bytes() + b"\xff\n")
    done = on_ray(ray_cluster, str(broken), tmp_path / "out", PrepareConfig())
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith(f"error: {broken} is not UTF-8: byte 0xff at offset ")
    assert "Traceback" not in done.err
    assert not (tmp_path / "out" / "manifest.json").exists()
