"""The pins, the lock file and the shape of what is installed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

PINNED = {
    "torch": "2.13.0",
    "triton": "3.7.1",
    "deepspeed": "0.19.8",
    "ray": "2.60.0",
    "webdataset": "1.0.2",
    "pyarrow": "26.0.0",
}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().split()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_the_load_bearing_packages_are_pinned_exactly() -> None:
    pins = {canonicalize_name(r.name): str(r.specifier) for r in map(Requirement, project()["dependencies"])}
    assert {name: pins[name] for name in PINNED} == {name: f"=={version}" for name, version in PINNED.items()}


def test_lock_satisfies_pyproject() -> None:
    locked, extras = lock(), project()["optional-dependencies"]
    for text in [*project()["dependencies"], *(r for group in extras.values() for r in group)]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is not in requirements.lock; run `make lock`"
        assert requirement.specifier.contains(locked[name], prereleases=True), f"{text} against {locked[name]}"


def test_lock_names_no_build_and_no_place() -> None:
    """`torch==2.13.0` must take a CPU build where one is configured and the CUDA build elsewhere."""
    text = (ROOT / "requirements.lock").read_text()
    assert "+cpu" not in text and "@" not in text and "://" not in text


@pytest.mark.long
def test_wheel_holds_the_two_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=200)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"vae_dist", "vae_kernels"}, tops
    assert "vae_dist/observe/report.html.jinja" in names and "vae_kernels/py.typed" in names
    page = {f"vae_dist/serve/explorer/{p.name}" for p in (ROOT / "vae_dist/serve/explorer").iterdir()}
    assert page and page <= set(names)
