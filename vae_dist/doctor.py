"""`vae-dist doctor`: what is installed, what this machine can do, and what is wrong with the remedy."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
import sysconfig
from pathlib import Path
from typing import Any

from vae_dist.observe.versions import versions

MINIMUM_PYTHON = (3, 11)


def examine() -> dict[str, Any]:
    """Facts about this machine; `problems` lists what is wrong, each with its remedy."""
    import torch

    from vae_dist.engine.compiler import search_path

    facts: dict[str, Any] = {
        "versions": versions(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_features": {
            "amx": torch.cpu._is_amx_tile_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "tools": {name: shutil.which(name, path=search_path()) for name in ("g++", "ninja", "git", "make")},
        "ray_token": _token_file(),
    }
    facts["problems"] = _problems(facts)
    return facts


def render(facts: dict[str, Any]) -> str:
    """The facts as aligned lines; problems last, each with what to do."""
    rows = [(name, str(version)) for name, version in facts["versions"].items()]
    features = ", ".join(name for name, there in facts["cpu_features"].items() if there) or "none of AMX, AVX512-BF16"
    rows += [
        ("platform", facts["platform"]),
        ("CPUs", f"{facts['cpus']} ({features})"),
        ("GPUs", ", ".join(facts["gpus"]) or "none: training runs on CPUs"),
        *((tool, path or "missing") for tool, path in facts["tools"].items()),
        ("Ray token", facts["ray_token"]["state"]),
    ]
    lines = [f"{name:<12} {value}" for name, value in rows]
    if not facts["problems"]:
        return "\n".join([*lines, "", "Nothing is wrong."])
    return "\n".join([*lines, "", *(f"PROBLEM: {p['what']}\n    fix: {p['fix']}" for p in facts["problems"])])


def _token_file() -> dict[str, str]:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        return {"state": "none yet: vae_dist makes one when it starts a local cluster", "mode": ""}
    return {"state": f"in {path}", "mode": stat.filemode(path.stat().st_mode)}


def _problems(facts: dict[str, Any]) -> list[dict[str, str]]:
    found = []

    def problem(what: str, fix: str) -> None:
        found.append({"what": what, "fix": fix})

    if sys.version_info < MINIMUM_PYTHON:
        problem(f"Python {platform.python_version()} is older than 3.11.", "Install Python 3.11 or newer.")
    for name, version in facts["versions"].items():
        if version == "not installed":
            problem(f"{name} is not installed.", "Run `make install`.")
    if not facts["tools"]["g++"]:
        problem("There is no g++, and DeepSpeed compiles an extension when it starts.", "Run `apt-get install g++`.")
    if not facts["tools"]["ninja"]:
        problem("ninja is missing, and DeepSpeed builds with it.", "Run `pip install ninja`.")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        problem("Python's headers are missing, and extensions need them.", "Run `apt-get install python3-dev`.")
    if facts["ray_token"]["mode"] and facts["ray_token"]["mode"] != "-rw-------":
        path = facts["ray_token"]["state"].removeprefix("in ")
        problem(f"Ray's token file {path} is readable by others ({facts['ray_token']['mode']}).", f"chmod 600 {path}")
    return found
