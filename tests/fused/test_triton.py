"""Runs the two Triton suites, each in a process whose environment fits it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent

pytest.importorskip("triton")


def run_suite(name, interpret):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HERE.parents[1] / "kernels")}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]


def test_kernels_against_float64():
    run_suite("triton_suite.py", interpret=not torch.cuda.is_available())


@pytest.mark.long
def test_word_and_segment_kernels_against_float64():
    run_suite("triton_words_suite.py", interpret=not torch.cuda.is_available())


@pytest.mark.long
def test_kernels_compile_for_every_architecture():
    run_suite("compile_suite.py", interpret=False)
