"""One of two gloo processes: a normalised posterior over a share of the rows, its loss and averaged gradients.

usage: whole_batch_worker.py FOLDER, under RANK and WORLD_SIZE; reads problem.safetensors and settings.json there
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from vae_dist.model.posterior import GaussianPosterior
from vae_dist.model.whole_batch import sum_over_ranks


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    problem, settings = load_file(folder / "problem.safetensors"), json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for name, split in settings["splits"].items():
        save_file(_share(problem, settings, split[rank], world), folder / f"{name}-{rank}.safetensors")
    dist.destroy_process_group()


def _share(problem: dict, settings: dict, numbers: list[int], world: int) -> dict[str, torch.Tensor]:
    ids = problem["sample_id_R"]
    real, own = int((ids >= 0).sum()), ids[numbers]
    posterior = GaussianPosterior(problem["h_RH"].shape[1], problem["upstream_RD"].shape[1], settings["gamma"]).double()
    posterior.load_state_dict(problem, strict=False)
    mean_RD, logvar_RD = posterior(problem["h_RH"][numbers], (own >= 0).float())
    sample = posterior.draw(mean_RD, logvar_RD, torch.tensor(settings["seed"]), own)
    mean_kl = sum_over_ranks(sample.kl.sum()) / real
    own_rows = (sample.z[0] * problem["upstream_RD"][numbers]).sum() + sample.kl.sum()
    # The contract of the loss: a rank's rows times the world size, what all ranks compute alike once.
    loss = world * own_rows / real + mean_kl.clamp(min=settings["free_bits"]).square()
    loss.backward()
    is_real = own >= 0
    result = {
        "loss": _mean(loss.detach(), world),
        "z": sample.z[0][is_real].detach(),
        "kl": sample.kl[is_real].detach(),
        "running_mean": posterior.batch_norm.running_mean,
        "running_var": posterior.batch_norm.running_var,
    }
    for name, parameter in posterior.named_parameters():
        result |= {f"own.{name}.grad": parameter.grad.clone(), f"{name}.grad": _mean(parameter.grad, world)}
    return result


def _mean(x: torch.Tensor, world: int) -> torch.Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total / world


if __name__ == "__main__":
    main()
