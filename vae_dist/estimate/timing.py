"""Seconds of a step and its parts, and the bytes that it sends.

Nothing overlaps, as is the default; what `cluster.overlap_communication`, hpZ and quantised communication save or need
is not estimated.

A ring of N workers moves (N - 1) / N of its bytes once for a gather or a scatter, and twice for an all-reduce (Thakur
et al. 2005, section 4). `tests/distributed/test_state_bytes.py` counts what real steps send.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from vae_dist.config.objective_schema import OptimizerConfig
from vae_dist.estimate.devices import Device
from vae_dist.estimate.memory import GATHERED_ELEMENTS, PERSISTENT_ELEMENTS, Sizes

_FLOAT = 4
# Passes over a parameter's fp32 numbers in an update: weight, gradient and two moments are read, all but the gradient
# written.
_ADAM_PASSES, _SGD_PASSES = 7, 3


class StepSeconds(NamedTuple):
    """Of one optimizer step on one worker."""

    compute: float
    communication: float
    update: float

    @property
    def total(self) -> float:
        """One after the other."""
        return sum(self)


def communication_bytes(sizes: Sizes, stage: int, workers: int, micro_batches: int) -> int:
    """That a worker sends in a step, by a ring.

    Stages 0 to 2 all-reduce gradients (DeepSpeed's default at 1 and 2, too: one all-reduce of a bucket in place of many
    small reductions), stage 2 after every micro-batch; 1 and 2 gather the new weights. Stage 3 scatters gradients of
    every micro-batch, and gathers weights for its forward and, if they are too many to stay, for its backward again.
    """
    if stage == 3:
        everything = [*(n for group in sizes.groups for n in group), *sizes.frozen]
        gathered = sum(n for n in everything if n > PERSISTENT_ELEMENTS)
        times = 1 if sizes.all <= GATHERED_ELEMENTS else 2
        elements = micro_batches * (times * gathered + sizes.trainable) + (sizes.all - gathered)
    else:
        reductions = micro_batches if stage == 2 else 1
        elements = (2 * reductions + (stage > 0)) * sizes.trainable
    return round(_FLOAT * elements * (workers - 1) / workers)


def step_seconds(
    sizes: Sizes,
    optimizer: OptimizerConfig,
    stage: int,
    workers: int,
    device: Device,
    *,
    flops: float,
    flops_per_second: float,
    least_seconds: float,
    sent_bytes: int,
) -> StepSeconds:
    """Of a worker whose micro-batches take `flops` FLOPs, recomputation included, at an assumed rate, and not less than
    `least_seconds`."""
    owned = sizes.trainable / (workers if stage else 1)
    passes = _SGD_PASSES if optimizer.kind == "sgd" else _ADAM_PASSES
    return StepSeconds(
        compute=max(least_seconds, flops / flops_per_second),
        communication=sent_bytes / device.bandwidth_between(workers) if workers > 1 else 0.0,
        update=_FLOAT * passes * owned / device.memory_bandwidth,
    )


def micro_batches_of(share: int, per_micro_batch: int) -> int:
    """How many micro-batches a worker's share of sequences is cut into."""
    return math.ceil(share / per_micro_batch)
