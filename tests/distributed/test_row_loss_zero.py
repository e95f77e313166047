"""Gradients of `linear_cross_entropy`'s row form under every ZeRO stage equal a single-process fp64 computation.

The row form reads the weight again in backward, when ZeRO-3 has let go of it.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT, free_port, rank_environment, start_command

from vae_kernels import reference

WORLD, VOCAB, HIDDEN = 2, 37, 12
LEARNING_RATE = 0.5
OFFSETS = [[0, 3, 3, 8], [0, 5, 9, 9, 13]]
# Importance weights of either sign, and a sequence that does not count.
UPSTREAM = [[0.7, 1.3, -0.4], [2.0, 0.0, -1.1, 0.5]]
HEADS = ("module", "outside", "checkpoint")
CASES = {
    f"zero{stage}-{head}{'-evaluating' if evaluates else ''}": (stage, head, evaluates)
    for stage in range(4)
    for head, evaluates in (*((head, False) for head in HEADS), ("module", True), ("outside", True))
}


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    found = {
        "embedding": torch.randn(VOCAB, HIDDEN, generator=generator),
        "linear": 0.5 * torch.randn(HIDDEN, HIDDEN, generator=generator),
        "bias": torch.randn(VOCAB, generator=generator),
    }
    for rank in range(WORLD):
        rows = OFFSETS[rank][-1]
        found[f"words-{rank}"] = torch.randint(VOCAB, (rows,), generator=generator)
        found[f"target-{rank}"] = torch.randint(VOCAB, (rows,), generator=generator)
        found[f"target-{rank}"][2] = -100
        found[f"offsets-{rank}"] = torch.tensor(OFFSETS[rank], dtype=torch.int32)
        found[f"upstream-{rank}"] = torch.tensor(UPSTREAM[rank])
    return found


@pytest.fixture(scope="module")
def results(inputs: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two real DeepSpeed processes found in every case."""
    out, port = tmp_path_factory.mktemp("row_loss"), free_port()
    save_file(inputs, out / "inputs.safetensors")
    ranks = [_start(out, rank, port) for rank in range(WORLD)]
    for process in ranks:
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, f"{output}\n{errors}"
    return out


def _start(out: Path, rank: int, port: int):
    script = str(ROOT / "tests/distributed/row_loss_worker.py")
    arguments = [str(out / "inputs.safetensors"), str(out), json.dumps(CASES)]
    return start_command([sys.executable, script, *arguments], rank_environment(rank, WORLD, port))


@pytest.fixture(scope="module")
def expected(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fp64, all ranks' sequences in one process: gradients of two SGD steps, and rank 0's losses after each."""
    embedding, linear, bias = (inputs[n].double().requires_grad_() for n in ("embedding", "linear", "bias"))

    def sequences(rank: int) -> torch.Tensor:
        x_NH = torch.tanh(embedding[inputs[f"words-{rank}"]] @ linear.t())
        nll_N = reference.linear_cross_entropy(x_NH, embedding, inputs[f"target-{rank}"], bias=bias)
        return reference.segment_sum(nll_N, inputs[f"offsets-{rank}"])

    found = {}
    parameters = {"embedding.weight": embedding, "linear.weight": linear, "head.bias": bias}
    for step in range(2):
        loss = sum((inputs[f"upstream-{rank}"] * sequences(rank)).sum() for rank in range(WORLD)) / WORLD
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                found[f"{name}-{step}"] = gradient
                parameter -= LEARNING_RATE * gradient
            found[f"nll-{step}"] = sequences(0)
    return found


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_single_process_fp64(results: Path, expected: dict[str, torch.Tensor], case: str) -> None:
    found = load_file(results / f"{case}.safetensors")
    stage, _, evaluates = CASES[case]
    for step in range(2):
        assert found.pop(f"held-{step}") == (0 if stage == 3 else VOCAB * HIDDEN)
    names = {name for name in expected if evaluates or not name.startswith("nll")}
    assert found.keys() == names
    for name in names:
        scale = float(expected[name].abs().max())
        error = float((found[name].double() - expected[name]).abs().max())
        assert error < 2e-5 * scale, f"{name}: {error} of {scale}"


def test_the_second_step_is_another_one(expected: dict[str, torch.Tensor]) -> None:
    for name, step in itertools.product(("embedding.weight", "linear.weight", "head.bias"), (0, 1)):
        assert float(expected[f"{name}-{step}"].abs().max()) > 0.05
    moved = (expected["embedding.weight-0"] - expected["embedding.weight-1"]).abs().max()
    assert float(moved) > 0.05
