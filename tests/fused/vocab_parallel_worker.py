"""One rank of test_vocab_parallel.py: its share of each case, written to a file.

usage: vocab_parallel_worker.py CASES.safetensors OUT BACKEND DTYPE, under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from vae_kernels import vocab_parallel_linear_cross_entropy


def main() -> None:
    given, out, backend, dtype = load_file(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], getattr(torch, sys.argv[4])
    cases = json.loads(Path(sys.argv[1]).with_suffix(".json").read_text())
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    gathered: list[int] = []
    plain_gather = dist.all_gather_into_tensor

    def counting_gather(output: torch.Tensor, pieces: torch.Tensor, **rest: object) -> object:
        gathered.append(pieces.numel())
        return plain_gather(output, pieces, **rest)

    dist.all_gather_into_tensor = counting_gather
    vocab = given["weight"].shape[0]
    # Shares of unequal size.
    bounds = [vocab * (share + 1) * share // (world * (world + 1)) for share in range(world)] + [vocab]
    words = slice(bounds[rank], bounds[rank + 1])
    results = {}
    for name, options in cases.items():
        x = given["x"].to(dtype).requires_grad_()
        weight = given["weight"][words].to(dtype).requires_grad_()
        bias = given["bias"][words].to(dtype).requires_grad_()
        gathered.clear()
        nll = vocab_parallel_linear_cross_entropy(
            x, weight, given["target"], bias=bias, first_word=words.start, total_vocab=vocab,
            group=dist.group.WORLD, backend=backend, **options,
        )  # fmt: skip
        grads = torch.autograd.grad(nll, (x, weight, bias), given["upstream"].to(nll.dtype))
        for part, value in zip(("nll", "x", "weight", "bias"), (nll.detach(), *grads), strict=True):
            results[f"{name}/{part}"] = value.contiguous()
        results[f"{name}/gathered"] = torch.tensor(gathered)
    save_file(results, out / f"rank{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
