"""The published benchmark's data and protocol: configs/ptb.yaml, and what `vae-dist eval` counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import RayCluster, run_command


@pytest.mark.long
def test_ptb_trains_and_its_test_split_is_counted_exactly(ptb: Path, ray_cluster: RayCluster, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vae_dist.train", "configs/ptb.yaml", f"data.source={ptb}"]
    settings = [f"run.storage={tmp_path}", "run.name=ptb", "train.steps=20", "evaluate.max_sequences=64"]
    trained = run_command([*command, *settings, "cluster.cpus_per_worker=1"], ray_cluster.environment)
    assert trained.status == 0, trained.err
    result = trained.json
    assert abs(result["baselines"]["bigram_ppl"] - 201.5) < 3, result["baselines"]
    test = ["--split", "test", "--importance-samples", "1"]
    done = run_command(
        [sys.executable, "-m", "vae_dist", "eval", str(tmp_path / "ptb"), result["data_dir"], *test],
        ray_cluster.environment,
    )
    assert done.status == 0, done.err
    assert (done.json["sequences"], done.json["tokens"]) == (3761, 82430)
    assert done.json["ppl"] >= 1 and done.json["iw_ppl"] > 1
