"""vocab_parallel_linear_cross_entropy on real process groups against a float64 computation of the whole vocabulary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT, free_port

from vae_kernels import reference, vocab_parallel_linear_cross_entropy

ROWS, HIDDEN, VOCAB = 19, 8, 37
CASES = {
    "plain": {},
    "recomputed": {"max_saved_bytes": 0},
    "partly kept": {"max_saved_bytes": 7 * 17 * 4},
    "smoothed": {"label_smoothing": 0.1},
    "all options": {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 5.0, "logit_scale": 1.3},
    "capped": {"z_loss": 1e-3, "softcap": 4.0},
}


def problem():
    """Rows of every kind: ignored, a sure target, a hopeless one (230 nats)."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64)
        for name, shape in {
            "x": (ROWS, HIDDEN),
            "weight": (VOCAB, HIDDEN),
            "bias": (VOCAB,),
            "upstream": (ROWS,),
        }.items()
    }
    tensors = {name: tensor.float().double() for name, tensor in tensors.items()}
    tensors["upstream"][5] = 0.0
    tensors["target"] = torch.arange(ROWS) * 7 % VOCAB
    tensors["target"][3] = -100
    tensors["x"][8] = 12.0 * tensors["weight"][int(tensors["target"][8])]
    tensors["x"][9] = -20.0 * tensors["weight"][int(tensors["target"][9])]
    # Everything likely is in the last shard, 128 nats away from the target's in the first.
    tensors["weight"][:, 0] = 0.0
    tensors["weight"][-1, 0] = 8.0
    tensors["x"][10] = 0.0
    tensors["x"][10, 0] = 16.0
    tensors["target"][10] = 0
    return tensors


def run(world, backend, dtype, folder):
    tensors = problem()
    save_file({name: t if name == "target" else t.float() if dtype == "float32" else t for name, t in tensors.items()},
              folder / "cases.safetensors")  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(CASES))
    port, worker = free_port(), str(Path(__file__).with_name("vocab_parallel_worker.py"))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "kernels"),
    }
    if backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, worker, str(folder / "cases.safetensors"), str(folder), backend, dtype]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(world)]


@pytest.mark.parametrize(
    "world, backend, dtype", [(2, "torch", "float64"), (3, "torch", "float32"), (2, "triton", "float32")]
)
def test_losses_and_gradients(world, backend, dtype, tmp_path):
    found = run(world, backend, dtype, tmp_path)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == "float64" else {"rtol": 2e-5, "atol": 4e-5}
    for name, options in CASES.items():
        tensors = problem()
        parameters = [tensors[key].requires_grad_() for key in ("x", "weight", "bias")]
        plain = {key: value for key, value in options.items() if key != "max_saved_bytes"}
        nll = reference.linear_cross_entropy(
            parameters[0], parameters[1], tensors["target"], bias=parameters[2], **plain
        )
        wanted = torch.autograd.grad(nll, parameters, tensors["upstream"])
        for rank in found:
            torch.testing.assert_close(rank[f"{name}/nll"].double(), nll.detach(), **tolerance)
            torch.testing.assert_close(rank[f"{name}/x"].double(), wanted[0], **tolerance)
            # One gather, of two floats a token; the means of smoothing are a third.
            assert rank[f"{name}/gathered"].tolist() == [(3 if options.get("label_smoothing") else 2) * ROWS]
        for part, whole in (("weight", wanted[1]), ("bias", wanted[2])):
            joined = torch.cat([rank[f"{name}/{part}"] for rank in found]).double()
            torch.testing.assert_close(joined, whole, **tolerance)


def test_shares_that_do_not_fit_are_refused():
    x, weight, target = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="words 5 to 9 of this rank are not among 8 in all"):
        vocab_parallel_linear_cross_entropy(x, weight, target, first_word=5, total_vocab=8, group=None)
