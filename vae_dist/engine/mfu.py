"""Model FLOPs utilisation: MFU = FLOPs per token x tokens per second / (workers x peak FLOP/s of a worker's device).

FLOPs per token are of forward and backward of a sequence of mean length, recomputation left out (Chowdhery et al. 2022,
appendix B), counted by running the model on tensors without data (`estimate/trace.py`), not by a formula such as 6 N.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from vae_dist.config.schema import Config
from vae_dist.data.stream.training_data import TrainingData
from vae_dist.estimate.devices import local_gpu
from vae_dist.model.precision import autocast_dtype


def mfu_of_rate(config: Config, data: TrainingData, device: torch.device) -> float | None:
    """The MFU of one token a second of all workers together; None where no peak is known."""
    autocast = autocast_dtype(config.train.precision, device)
    # A processor's peak depends on how many workers share it, and on its temperature.
    gpu = local_gpu() if device.type == "cuda" else None
    peak = config.run.peak_flops or (gpu.peak(autocast) if gpu else None)
    if peak is None:
        return None
    # Takes a second, which a run without a peak need not spend.
    from vae_dist.estimate.trace import Shape, micro_batch_cost

    shape = Shape(1, max(1, round(data.tokens_per_step / config.train.batch_sequences)))
    vocab_size = data.datasets[0].tokenizer.vocab_size
    cost = micro_batch_cost(config, vocab_size, shape, autocast, device.type == "cuda")
    flops_per_token = (cost.forward_flops + cost.backward_flops) / shape.tokens
    return flops_per_token / (dist.get_world_size() * peak)
