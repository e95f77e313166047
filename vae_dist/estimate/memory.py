"""Bytes of a device: weights, gradients, optimizer state and DeepSpeed's buffers at each ZeRO stage; of a checkpoint.

All is fp32 (`engine/zero.py`). P parameters, N workers. This is what DeepSpeed 0.19 holds; the formulas of the paper
(Rajbhandari et al., "ZeRO", 2020, section 5) have neither its second copy of fp32 weights nor the whole gradients of
parameters that lie on a border:

    stage    weights                                  gradients                      each moment
    0        P                                        P                              P
    1, 2     P and a share of a copy, P / N           P / N, and see                 P / N
                                                      `_sharded_gradients`
    3        two shares, 2 P / N, and small           P / N                          P / N
             parameters whole

`tests/distributed/test_state_bytes.py` measures each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import nn

from vae_dist.config.objective_schema import OptimizerConfig
from vae_dist.model.parameter_groups import parameter_groups

_FLOAT = 4
# Most elements of a bucket of gradients, as DeepSpeed has them by default and the engine sets them.
BUCKET_ELEMENTS = 500_000_000
# DeepSpeed's defaults, which the engine keeps: elements below which ZeRO-3 leaves a parameter whole, elements that it
# lets be gathered at a time.
PERSISTENT_ELEMENTS = 100_000
GATHERED_ELEMENTS = 1_000_000_000


class Sizes(NamedTuple):
    """Elements of a model that the formulas need.

    Attributes:
        groups: of trainable parameters, as the optimizer groups them.
        frozen: of parameters that are not trained.
        buffers: that are saved with the weights.
        header_bytes: of a checkpoint's names and shapes.
    """

    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...]
    buffers: int
    header_bytes: int

    @property
    def trainable(self) -> int:
        """Trainable elements; a tied matrix counts once."""
        return sum(map(sum, self.groups))

    @property
    def all(self) -> int:
        """Elements of all parameters."""
        return self.trainable + sum(self.frozen)


class ModelState(NamedTuple):
    """Bytes that a worker holds between steps, the gradients as they are before the update; of the worker with most.

    Attributes:
        weights, gradients, optimizer: what their names say.
        average: of averaged weights, whole on every worker.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        """Of all."""
        return sum(self)


def sizes_of(module: nn.Module, optimizer: OptimizerConfig, has_average: bool) -> Sizes:
    """Of a model, which may be on the meta device; named as the engine's."""
    groups = parameter_groups(module, optimizer.weight_decay)
    kept = module.state_dict(keep_vars=True)
    buffers = {name: b for name, b in module.named_buffers() if name in kept}
    slots = _moments(optimizer)
    names = dict(module.named_parameters()) | buffers
    entries: dict[str, object] = {}
    for name, tensor in names.items():
        moments = (*(["exp_avg", "exp_avg_sq", "step"] if slots else []), *(["average"] if has_average else []))
        for slot in ("", *(f"::{moment}" for moment in moments if tensor.requires_grad)):
            shape = [] if slot == "::step" else list(tensor.shape)
            entries[name + slot] = {"dtype": "F32", "shape": shape, "data_offsets": [10**8, 10**8]}
    return Sizes(
        groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
        frozen=tuple(p.numel() for p in module.parameters() if not p.requires_grad),
        buffers=sum(b.numel() for b in buffers.values()),
        header_bytes=len(json.dumps(entries, separators=(",", ":"))),
    )


def model_state(sizes: Sizes, optimizer: OptimizerConfig, stage: int, workers: int) -> ModelState:
    """Bytes of a worker at a ZeRO stage."""
    share = sum(-(-sum(group) // workers) for group in sizes.groups)
    frozen = sum(sizes.frozen)
    average = sizes.trainable if optimizer.average_decay else 0
    if stage == 0:
        weights, gradients, owned = sizes.all, sizes.trainable, sizes.trainable
    elif stage < 3:
        weights, gradients, owned = sizes.all + share, _sharded_gradients(sizes, workers), share
    else:
        everything = [*(n for group in sizes.groups for n in group), *sizes.frozen]
        persistent = sum(n for n in everything if n <= PERSISTENT_ELEMENTS)
        parts = sum(-(-n // workers) for group in sizes.groups for n in group)
        weights, gradients, owned = 2 * parts + -(-frozen // workers) + persistent, parts, parts
    return ModelState(
        _FLOAT * (weights + sizes.buffers),
        _FLOAT * gradients,
        _FLOAT * _moments(optimizer) * owned,
        _FLOAT * average,
    )


def buffer_bytes(sizes: Sizes, stage: int) -> int:
    """What DeepSpeed needs besides during a step: a bucket, gradients that wait for it, gathered parameters.

    At stage 0 gradients are reduced where they lie (`engine/gradients.py`). At stage 1 they are whole until the last
    micro-batch; above they leave with each bucket, into whose memory they are copied. ZeRO-3 keeps what it gathered in
    forward until backward, up to a limit.
    """
    if stage == 0:
        return 0
    bucket = min(sizes.all, BUCKET_ELEMENTS)
    waiting = sizes.trainable if stage == 1 else 0
    gathered = min(sizes.all, GATHERED_ELEMENTS) if stage == 3 else 0
    return _FLOAT * (bucket + waiting + gathered)


def checkpoint_bytes(sizes: Sizes, optimizer: OptimizerConfig) -> int:
    """Of one checkpoint, over all workers: weights, moments and averages, whole and fp32, and their names."""
    copies = 1 + _moments(optimizer) + (1 if optimizer.average_decay else 0)
    return _FLOAT * (copies * sizes.trainable + sum(sizes.frozen) + sizes.buffers) + sizes.header_bytes


def _moments(optimizer: OptimizerConfig) -> int:
    return 0 if optimizer.kind == "sgd" else 2


def _sharded_gradients(sizes: Sizes, workers: int) -> int:
    """Elements of gradients that the worker with most of them holds at stages 1 and 2.

    A group's parameters lie one after the other and are cut into equal parts; a worker holds the whole gradient of
    every parameter of which it has a part.
    """
    held = np.zeros(workers, dtype=np.int64)
    for group in sizes.groups:
        held += _held_by_workers(group, workers)
    return int(held.max())


def _held_by_workers(group: Sequence[int], workers: int) -> np.ndarray:
    length = -(-sum(group) // (2 * workers)) * 2
    changes, start = np.zeros(workers + 1, dtype=np.int64), 0
    for elements in group:
        # A parameter that begins inside a part belongs to it; those parts that begin inside a parameter have it, too.
        first, last = start // length, (start + elements - 1) // length
        changes[first] += elements
        changes[last + 1] -= elements
        start += elements
    return np.cumsum(changes[:-1])
