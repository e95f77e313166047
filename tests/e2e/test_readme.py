"""The README's commands, run in order in an empty folder, and its claims about files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, TINY, RayCluster, corpus

# Run in tests of their own, because they install, serve or submit.
ELSEWHERE = {
    "make train": "tests/e2e/test_default.py",
    "make test": ".ci/run",
    "vae-dist serve runs/mine": "tests/serve/test_serve.py",
    "ray job submit --working-dir . -- python -m vae_dist.train": "tests/e2e/test_ray_job.py",
    "ray job submit -- python -m vae_dist.train": "tests/e2e/test_ray_job.py",
}


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme")
    (path / "corpus.txt").write_text("\n".join(corpus()), encoding="utf-8")
    return path


@pytest.mark.long
def test_every_command_works_as_written(folder: Path, ray_cluster: RayCluster) -> None:
    paths = [str(ROOT), str(ROOT / "kernels")]
    environment = {**os.environ, **ray_cluster.environment, "PYTHONPATH": os.pathsep.join(paths)}
    ran = 0
    for line in commands():
        if line in ELSEWHERE:
            continue
        arguments = shlex.split(line)
        head = {"vae-dist": [sys.executable, "-m", "vae_dist"], "python": [sys.executable]}[arguments[0]]
        # The model is made small, or the training would take minutes; the command stays what it is.
        extra = list(TINY) if "vae_dist.train" in arguments else []
        done = subprocess.run(
            [*head, *arguments[1:], *extra], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        last = done.stdout.strip().splitlines()[-1]
        assert last.startswith("{") and last.endswith("}"), f"{line} ends with {last!r}"
        ran += 1
    assert ran >= 10


def test_commands_run_elsewhere_are_in_the_readme() -> None:
    assert set(ELSEWHERE) <= set(commands())
    for path in ELSEWHERE.values():
        assert (ROOT / path).exists(), path


def test_paths_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:vae_dist|kernels|tests|cluster|configs)/[\w./]*)`", text)
    assert len(named) > 15
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, missing
