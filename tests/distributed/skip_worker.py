"""Steps whose gradients are made NaN, infinite or huge on one rank; prints what the engine did of them as JSON.

usage: skip_worker.py DATASET STAGE OPTIMIZER, under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from support import TINY

from vae_dist.config.load import load_config
from vae_dist.data.stream.training_data import open_training_data
from vae_dist.engine.build import start_engine
from vae_dist.engine.step import TrainStep
from vae_dist.engine.zero import named_state

# Step -> what the gradient of one parameter is multiplied with on the last rank.
BAD = {3: float("nan"), 5: float("inf"), 140: 1e6, 145: 3.0}


def main() -> None:
    data_dir, stage, optimizer = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    settings = [*TINY, f"data.dir={data_dir}", f"cluster.zero_stage={stage}", f"optimizer.kind={optimizer}"]
    config = load_config(None, [*settings, "optimizer.skip_above_median=10", "optimizer.learning_rate=0.001"])
    data = open_training_data([data_dir], config)
    engine, _ = start_engine(config, data.datasets[0].tokenizer, torch.device("cpu"))
    factor = [1.0]
    engine.module.vae.embedding.weight.register_hook(lambda grad: grad * factor[0])
    step = TrainStep(engine, config, 150)
    found = []
    for number, share in enumerate(data.stream(dist.get_rank(), dist.get_world_size()).shares(0, 150)):
        factor[0] = BAD.get(number, 1.0) if dist.get_rank() == dist.get_world_size() - 1 else 1.0
        batches, _ = step.batches(share, False)
        before = state(engine) if number in BAD else {}
        terms = step(number, batches, share.real_sequences)
        if number in BAD:
            after = state(engine)
            same = all(torch.equal(before[key], after[key]) for key in after)
            found.append({"step": number, "same": same, "sequences": float(terms.sequences), "rec": float(terms.rec)})
    if dist.get_rank() == 0:
        finite = all(value.isfinite().all() for value in state(engine).values())
        print(json.dumps({"bad": found, "skipped": step.skip_rule.skipped, "finite": bool(finite)}))
    else:
        state(engine)


def state(engine: object) -> dict[str, torch.Tensor]:
    """Weights, moments and counts of updates. Collective."""
    tensors = {}
    for one in named_state(engine):
        tensors[one.name] = one.weight
        tensors |= {f"{one.name}::{slot}": value for slot, value in one.slots.items()}
    return tensors


if __name__ == "__main__":
    main()
