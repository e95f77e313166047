"""The launcher file, the Slurm script, the image and the runtime environment: against what reads them."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import dockerfile
import jsonschema
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import start
from support import ROOT

CLUSTER = ROOT / "cluster"
SECRET = re.compile(r"(token|secret|password|passwd|credential|api_?key)\s*[=:]\s*['\"]?[\w+/-]{12,}", re.IGNORECASE)


def with_venv() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def launcher() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "launcher.yaml").read_text())


def test_ray_accepts_the_launcher_file() -> None:
    validate_config(prepare_config(launcher()))
    for path in ((), ("auth",)):
        damaged = copy.deepcopy(launcher())
        (damaged[path[0]] if path else damaged)["tokne"] = "x"
        with pytest.raises(jsonschema.ValidationError):
            validate_config(prepare_config(damaged))


def test_the_launcher_uses_a_private_token_and_a_dashboard_on_loopback() -> None:
    config = launcher()
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    (head,) = (c for c in config["head_start_ray_commands"] if " start " in c)
    (worker,) = (c for c in config["worker_start_ray_commands"] if " start " in c)
    for command in (head, worker):
        variable, program, verb, *flags = shlex.split(command)
        assert (variable, program, verb) == ("RAY_AUTH_MODE=token", "~/vae_dist/.venv/bin/ray", "start")
        known = {option for parameter in start.params for option in parameter.opts}
        assert {flag.partition("=")[0] for flag in flags} <= known
    assert "--dashboard-host=127.0.0.1" in head
    # What `make install` makes is what the commands use.
    makefile = (ROOT / "Makefile").read_text()
    assert "make -C ~/vae_dist install" in config["setup_commands"] and "VENV := .venv" in makefile


def test_the_runtime_environment_is_one() -> None:
    given = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    environment = RuntimeEnv(**given)["env_vars"]
    assert environment["RAY_AUTH_MODE"] == "token" and int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > 3
    with pytest.raises((TypeError, ValueError)):
        RuntimeEnv(**{**given, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": 120}})


def test_the_slurm_script_is_good_shell() -> None:
    script = str(CLUSTER / "slurm.sh")
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["shellcheck", script], capture_output=True, env=with_venv())
    assert done.returncode == 0, done.stdout.decode()


# Of sbatch's manual; those that a script of this kind may use.
SBATCH = {
    "job-name": r"[\w.-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "exclusive": "",
    "time": r"(\d+-)?\d+(:\d\d){0,2}",
    "requeue": "",
    "open-mode": "append|truncate",
    "signal": r"(R?B?:)?(USR1|USR2|TERM|INT)(@\d+)?",
    "output": r"\S+",
    "partition": r"\S+",
}


def test_the_slurm_script_asks_for_what_sbatch_knows() -> None:
    directives = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (CLUSTER / "slurm.sh").read_text(), re.MULTILINE)
    assert len(directives) == len(re.findall("^#SBATCH", (CLUSTER / "slurm.sh").read_text(), re.MULTILINE))
    for name, value in directives:
        assert re.fullmatch(SBATCH[name], value), f"{name}={value}"
    given = dict(directives)
    # One Ray node for each host, alone on it: Ray's ports are not for two.
    assert given["ntasks-per-node"] == "1" and "exclusive" in given


def instructions() -> list[Any]:
    return list(dockerfile.parse_file(str(CLUSTER / "Dockerfile")))


def test_the_image_is_pinned_and_not_root() -> None:
    known = {"from", "run", "workdir", "copy", "user", "env", "label"}
    assert {one.cmd.lower() for one in instructions()} <= known
    (base,) = (one.value[0] for one in instructions() if one.cmd.lower() == "from")
    version = re.fullmatch(r"python:(\d+\.\d+\.\d+)-slim-\w+", base)
    assert version, f"{base} must be a whole version"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(version.group(1))
    users = [one.value[0] for one in instructions() if one.cmd.lower() == "user"]
    assert users[-1] == "1000:1000" and instructions()[-1].cmd.lower() == "user"


def test_the_image_installs_what_the_lock_says() -> None:
    runs = [one.value[0] for one in instructions() if one.cmd.lower() == "run"]
    (install,) = (run for run in runs if "pip install" in run)
    assert shlex.split(install) == ["pip", "install", "--no-cache-dir", "--constraint", "requirements.lock", "."]
    for run in runs:
        subprocess.run(["bash", "-n"], input=run.encode(), check=True)
    packages = next(run for run in runs if "apt-get" in run)
    # What `make install` asks of a machine and the base image lacks.
    assert {"g++", "wget"} <= set(packages.split())


@pytest.mark.long
def test_what_the_image_copies_builds_the_package(tmp_path: Path) -> None:
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "**", "what is not named is not sent"
    for one in instructions():
        if one.cmd.lower() == "copy":
            *sources, target = one.value
            for source in sources:
                assert f"!{source}" in ignored
                kind = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                kind(ROOT / source, tmp_path / target / Path(source).name if target == "./" else tmp_path / target)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path / "wheel")]
    subprocess.run([*build, str(tmp_path)], check=True, timeout=200)
    names = set(zipfile.ZipFile(next((tmp_path / "wheel").glob("*.whl"))).namelist())
    assert {"vae_dist/train.py", "vae_kernels/py.typed"} <= names
    assert (tmp_path / "configs/ptb.yaml").exists()


def test_no_file_of_the_cluster_holds_a_secret() -> None:
    assert SECRET.search("AWS_SECRET: 'ab3+/0123456789'")
    for path in CLUSTER.rglob("*"):
        if path.is_file():
            for line in path.read_text().splitlines():
                assert not SECRET.search(line), f"{path}: {line}"


def test_the_readme_names_every_file_and_no_other() -> None:
    text = (CLUSTER / "README.md").read_text()
    there = {str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*") if path.is_file()}
    named = set(re.findall(r"cluster/((?:kuberay/)?[\w.-]+\.(?:yaml|sh|json)|Dockerfile)\b", text))
    assert named == there - {"README.md", "Dockerfile.dockerignore"}
