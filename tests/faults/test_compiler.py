"""Torch's lock on what it compiles: one that a killed process left holds nobody up, one that is held is respected."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import free_port, rank_environment, run_command
from torch.utils.cpp_extension import get_default_build_root

from vae_dist.engine.compiler import one_compiles

START = """
import deepspeed, torch.distributed
from vae_dist.engine.compiler import one_compiles, require_compiler
require_compiler()
torch.distributed.init_process_group("gloo")
with one_compiles():
    deepspeed.init_distributed()
print("began")
"""


def test_a_lock_that_a_killed_process_left_holds_nobody_up(tmp_path: Path) -> None:
    """Protected by `lock.unlink` in `one_compiles` (engine/compiler.py)."""
    folder, built = tmp_path / "deepspeed_shm_comm", list(Path(get_default_build_root()).glob("*/deepspeed_shm_comm"))
    if built:
        # Ninja finds what is there and compiles nothing.
        shutil.copytree(built[0], folder)
    folder.mkdir(exist_ok=True)
    (folder / "lock").touch()
    environment = rank_environment(0, 1, free_port()) | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = run_command([sys.executable, "-c", START], environment, timeout=200)
    assert done.status == 0 and done.out.endswith("began\n"), done.err
    assert not (folder / "lock").exists() and list(folder.glob("*.so"))


def test_a_lock_that_is_held_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protected by `_is_held` in engine/compiler.py."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    hold = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with one_compiles():
        assert lock.exists()
    holder.kill()
    holder.wait()
    with one_compiles():
        assert not lock.exists()


def test_the_place_is_the_one_that_torch_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protected by `get_default_build_root` in `one_compiles` (engine/compiler.py)."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with one_compiles():
        assert (Path(get_default_build_root()) / "vae_dist.lock").exists()
    assert os.fspath(get_default_build_root()).startswith(str(tmp_path))
