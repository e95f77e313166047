"""One rank of a gradient check: builds the engine at each ZeRO stage, runs one global batch, writes gradients.

usage: gradient_worker.py DATASET OUT CASES.json, under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from vae_dist.config.load import load_config
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.stream.stream import Stream
from vae_dist.data.stream.training_data import order_spec
from vae_dist.data.stream.windows import EpochWindows
from vae_dist.engine.build import start_engine
from vae_dist.engine.step import TrainStep


def main() -> None:
    dataset = Dataset.open(sys.argv[1])
    out, cases = Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, overrides in cases.items():
        config = load_config(None, overrides)
        engine, _ = start_engine(config, dataset.tokenizer, torch.device("cpu"))
        split = dataset.split("train")
        spec = order_spec(config, split, dataset.manifest_hash)
        stream = Stream([split], EpochWindows(spec), dist.get_rank(), dist.get_world_size())
        step = TrainStep(engine, config, total_steps=10)
        # The last step of the epoch: its global batch is ragged.
        number = spec.steps_per_epoch - 1
        share = stream.share(number)
        batches, _ = step.batches(share, should_stop=False)
        gradients: dict[str, torch.Tensor] = {}
        engine.step = lambda gradients=gradients, engine=engine: gradients.update(_gradients(engine))
        step(number, batches, share.real_sequences)
        if dist.get_rank() == 0:
            save_file(gradients, out / f"{name}-w{dist.get_world_size()}.safetensors")
            sizes = [[len(b.lengths_B), b.tokens_BT.shape[1]] for b in batches]
            (out / f"{name}-w{dist.get_world_size()}.json").write_text(json.dumps(sizes))
        engine.destroy()


def _gradients(engine: object) -> dict[str, torch.Tensor]:
    stage = engine.zero_optimization_stage()
    return {
        name: (parameter.grad if stage == 0 else safe_get_full_grad(parameter)).detach().float().clone()
        for name, parameter in engine.module.named_parameters()
    }


if __name__ == "__main__":
    main()
