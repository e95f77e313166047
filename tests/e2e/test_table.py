"""A real table on a small corpus: trained, interrupted as a terminal does it, gone on with, evaluated."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import TINY, Finished, RayCluster, records, run_command, start_command, wait_for

from vae_dist.config.load import load_config
from vae_dist.data.store.dataset import Dataset

STEPS = 200


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A short row and one that can be interrupted, each step logged."""
    (tmp_path / "base.yaml").write_text("run: {log_every_steps: 1, checkpoint_every_steps: 10000}\n")
    rows = [
        {"method": "plain", "overrides": ["objective.free_bits=none", "train.steps=40"]},
        {"method": "beta 0.5", "overrides": ["objective.free_bits=none", "objective.beta=0.5"], "seeds": [3]},
    ]
    shared = [*TINY, f"train.steps={STEPS}", "evaluate.every_steps=40", "evaluate.select=best"]
    definition = {"base": str(tmp_path / "base.yaml"), "overrides": shared, "rows": rows}
    path = tmp_path / "tiny.table.yaml"
    path.write_text(yaml.safe_dump({**definition, "evaluation": {"importance_samples": 5}}))
    return path


def steps_of(run: Path) -> list[int]:
    return [record["step"] for record in records(run, "train")]


def started(storage: Path, method: str) -> Path:
    """The run directory of a row, or one that does not exist."""
    return next(storage.glob(f"tiny-{method}-*"), storage / "none")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_table_goes_on_after_ctrl_c_and_its_numbers_are_those_of_an_uninterrupted_run(
    table: Path, train: Callable[..., Finished], ray_cluster: RayCluster, dataset_dir: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "runs"
    machine = [f"run.storage={storage}", f"data.dir={dataset_dir}", "cluster.workers=1"]
    command = [sys.executable, "-m", "vae_dist", "table", str(table), *machine]
    process = start_command(command, ray_cluster.environment)
    try:
        wait_for(lambda: len(steps_of(started(storage, "beta-0-5"))) >= 3, 400, "three steps of the second row")
        # The group of the table's process, as a terminal's Ctrl-C.
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            # The training is in a group of its own and ends with what it is sent.
            process.terminate()
            process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out.strip().splitlines()[-1])["finished"] is False and err.count("stopping: saving") == 1, err
    assert [r["method"] for r in results(tmp_path)] == ["plain"]
    first = started(storage, "plain")
    untouched = (first / "metrics.jsonl").stat().st_mtime_ns

    listed = run_command([*command, "--list"], ray_cluster.environment)
    stopped = steps_of(started(storage, "beta-0-5"))[-1]
    assert [r["state"] for r in listed.json["rows"]] == ["done", f"step {stopped} of {STEPS}"]

    done = run_command(command, ray_cluster.environment, timeout=400)
    assert done.status == 0 and done.json["finished"] is True, done.err
    assert f"resuming from step {stopped}" in done.err
    assert (first / "metrics.jsonl").stat().st_mtime_ns == untouched, "a finished row was trained again"
    plain, beta = results(tmp_path)
    split = Dataset.open(dataset_dir).split("test")
    for row in (plain, beta):
        assert (row["sequences"], row["tokens"], row["importance_samples"]) == (split.sequences, split.tokens, 5)
        assert 1 < row["iw_ppl"] < row["elbo_ppl"] * 1.01 and row["valid"]["ppl"] > 1
    assert (plain["seed"], beta["seed"]) == (0, 3)

    resolved = load_config(tmp_path / "tiny/beta-0-5-seed3/resolved.yaml")
    assert (resolved.objective.beta, resolved.train.seed, resolved.run.storage) == (0.5, 3, "runs")
    whole = train(
        str(tmp_path / "base.yaml"), *TINY, f"train.steps={STEPS}", "evaluate.every_steps=40", "evaluate.select=best",
        "objective.free_bits=none", "objective.beta=0.5", "train.seed=3", "run.name=whole", *machine,
    )  # fmt: skip
    assert whole.status == 0, whole.err
    assert whole.json["valid"] == beta["valid"]
    evaluate = [sys.executable, "-m", "vae_dist", "eval", str(storage / "whole"), str(dataset_dir)]
    again = run_command([*evaluate, "--split", "test", "--importance-samples", "5"], ray_cluster.environment)
    assert again.json["iw_ppl"] == pytest.approx(beta["iw_ppl"], rel=1e-6)
    assert again.json["ppl"] == pytest.approx(beta["elbo_ppl"], rel=1e-6)


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "tiny.json").read_text())
