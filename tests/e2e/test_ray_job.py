"""`ray job submit` with token authentication: from a working directory, and where the package is installed."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from support import ROOT, TINY, RayCluster, run_command

ENTRY = ["python", "-m", "vae_dist.train"]


def job_settings(storage: Path, dataset_dir: Path) -> list[str]:
    return [*TINY, f"run.storage={storage}", "run.name=job", f"data.dir={dataset_dir}", "train.steps=6"]


@pytest.mark.parametrize("how", ["working directory", pytest.param("installed", marks=pytest.mark.long)])
def test_job_trains_to_the_end(how: str, ray_cluster: RayCluster, dataset_dir: Path, tmp_path: Path) -> None:
    where = ["--working-dir", "."] if how == "working directory" else []
    submit = ["ray", "job", "submit", "--address", ray_cluster.dashboard, *where, "--"]
    done = run_command([*submit, *ENTRY, *job_settings(tmp_path, dataset_dir)], ray_cluster.environment)
    assert done.status == 0, done.out + done.err
    result = json.loads((tmp_path / "job/result.json").read_text())
    assert result["steps"] == 6
    assert json.dumps(result["valid"]["ppl"])[:8] in done.out, "the JSON line must be in the job's output"
    if how == "working directory":
        assert (ROOT / ".rayignore").exists()


def test_wrong_token_is_refused(ray_cluster: RayCluster, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    answer = httpx.get(f"{ray_cluster.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {'0' * 64}"})
    assert answer.status_code in (401, 403), answer.text
    submit = ["ray", "job", "submit", "--address", ray_cluster.dashboard, "--", *ENTRY]
    done = run_command(submit, {**ray_cluster.environment, "RAY_AUTH_TOKEN_PATH": str(wrong)}, timeout=60)
    assert done.status != 0


@pytest.mark.long
def test_failed_job_has_the_exit_status_and_one_message(ray_cluster: RayCluster) -> None:
    submit = ["ray", "job", "submit", "--address", ray_cluster.dashboard, "--working-dir", ".", "--"]
    done = run_command([*submit, *ENTRY, "train.sed=3"], ray_cluster.environment, timeout=120)
    assert done.status != 0
    assert "Did you mean 'seed'?" in done.out + done.err and "Traceback" not in done.out, done.out
