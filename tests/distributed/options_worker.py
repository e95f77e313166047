"""Trains cases one after the other through the engine's own loop, with real DeepSpeed and without Ray.

usage: options_worker.py DATASET STORAGE CASES.json, under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK.
CASES: name -> arguments of `vae_dist.train`, a configuration file and overrides. Run directories are STORAGE/<name>.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist

from vae_dist.config.load import load_config
from vae_dist.data.stream.training_data import open_training_data
from vae_dist.engine.loop import train
from vae_dist.engine.plan import claim_run_dir, plan_run


def main() -> None:
    data_dir, storage, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, arguments in cases.items():
        places = (f"data.dir={data_dir}", f"run.storage={storage}", f"run.name={name}")
        path, overrides = (arguments[0], arguments[1:]) if arguments[0].endswith(".yaml") else (None, arguments)
        config = load_config(path, [*overrides, *places])
        plan = plan_run(config, open_training_data([data_dir], config), [data_dir], time.time())
        if dist.get_rank() == 0:
            claim_run_dir(plan, {})
        dist.barrier()
        trained = train(plan, torch.device("cpu"), lambda: False)
        if dist.get_rank() == 0:
            torch.save(trained.weights, plan.run_dir / "weights.pt")


if __name__ == "__main__":
    main()
