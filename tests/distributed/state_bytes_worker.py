"""One rank of a measurement: which bytes of weights, gradients and optimizer state a rank holds, and which it sends.

usage: state_bytes_worker.py DATASET OUT CASES.json, under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK

Counted are the storages of all tensors that are alive, before and after the update of the second of two steps, and the
bytes that a ring would send for the collectives of that step. DeepSpeed's own bucket for the reduction is left out; it
is known by its length.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vae_dist.config.load import load_config
from vae_dist.data.stream.training_data import open_training_data
from vae_dist.engine.average import WeightAverage
from vae_dist.engine.build import start_engine
from vae_dist.engine.step import TrainStep

# Of a collective: which argument is the larger tensor, and how often a ring sends it (times (N - 1) / N).
COLLECTIVES = {
    "all_reduce": (0, 2),
    "all_gather_into_tensor": (0, 1),
    "reduce_scatter_tensor": (1, 1),
    "all_gather": (0, 1),
    "reduce_scatter": (1, 1),
}
SENT = {"bytes": 0.0}


def main() -> None:
    dataset, out, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    for name, how in COLLECTIVES.items():
        setattr(dist, name, _counted(getattr(dist, name), *how))
    dist.init_process_group("gloo")
    # What the first step of a process leaves behind for the next ones is no part of a model.
    first = next(iter(cases.values()))
    for name, overrides in {"warm-up": first, **cases}.items():
        found = _measure(dataset, overrides)
        (out / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(found))
        gc.collect()


def _measure(dataset: str, overrides: list[str]) -> dict[str, float]:
    ignored = set(_storages())
    config = load_config(None, [*overrides, f"data.dir={dataset}"])
    data = open_training_data([dataset], config, workers=dist.get_world_size())
    engine, _ = start_engine(config, data.datasets[0].tokenizer, torch.device("cpu"))
    decay = config.optimizer.average_decay
    average = WeightAverage(engine.module, decay) if decay else None
    stream = data.stream(dist.get_rank(), dist.get_world_size())
    step = TrainStep(engine, config, 10, None, average)
    update, found = engine.step, {}

    def measured_update() -> None:
        found["before update"] = _held(engine, ignored)
        update()
        found["updated"] = _held(engine, ignored)

    engine.step = measured_update
    for number in range(2):
        share = stream.share(number)
        batches, _ = step.batches(share, should_stop=False)
        ignored |= {t.untyped_storage()._cdata for b in batches for t in vars(b).values()}
        SENT["bytes"] = 0.0
        step(number, batches, share.real_sequences)
        found |= {"sent": SENT["bytes"], "micro-batches": len(batches)}
    engine.destroy()
    return found


def _counted(collective: Callable[..., Any], which: int, times: int) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*args: Any, **options: Any) -> Any:
        given = [*args, *options.values()][which]
        tensors = given if isinstance(given, list) else [given]
        world = dist.get_world_size()
        SENT["bytes"] += times * (world - 1) / world * sum(t.numel() * t.itemsize for t in tensors)
        return collective(*args, **options)

    return call


def _storages() -> dict[int, torch.UntypedStorage]:
    """Every storage that a tensor of this process stands on, by identity."""
    gc.collect()
    found: dict[int, torch.UntypedStorage] = {}
    for thing in gc.get_objects():
        if not isinstance(thing, torch.Tensor):
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                found[storage._cdata] = storage
    return found


def _held(engine: Any, ignored: set[int]) -> int:
    sizes = [s.nbytes() for key, s in _storages().items() if key not in ignored]
    bucket = 4 * engine._config.zero_config.reduce_bucket_size
    return sum(size for size in sizes if size != bucket)


if __name__ == "__main__":
    main()
