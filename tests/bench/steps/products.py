"""How much of a step is matrix products, and how fast they are beside torch.mm at the same shapes.

Shapes: M x K times K x N. An LSTM's products are those of its inputs, all steps at once, and of its state, step by
step.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

_REPEATS, _SECONDS = 5, 0.02
Product = tuple[int, int, int]
"""M, K, N."""


class Products(NamedTuple):
    """Of one step.

    Attributes:
        fraction: the share of the step's time spent in operators that multiply matrices.
        rate_fraction: their rate over that of torch.mm at their shapes in the same dtype.
    """

    fraction: float
    rate_fraction: float


def measure_products(step: Callable[[], object], dtype: torch.dtype) -> Products:
    """Profile one step and time torch.mm at every shape it met."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        start = time.perf_counter()
        step()
        whole = time.perf_counter() - start
    spent = ideal = 0.0
    for event in profiled.key_averages(group_by_input_shape=True):
        products = list(_products(event.key, event.input_shapes))
        # An operator that only calls another of the same name is counted there.
        if not products or event.self_cpu_time_total < 0.5 * event.cpu_time_total:
            continue
        spent += 1e-6 * event.self_cpu_time_total
        ideal += event.count * sum(times * _mm_seconds(product, dtype) for product, times in products)
    return Products(spent / whole, ideal / spent)


def _products(operator: str, shapes: list[Any]) -> Iterator[tuple[Product, int]]:
    """The products of an operator's call, each with how often it is made."""
    if operator in ("aten::mm", "aten::addmm", "aten::bmm"):
        left, right = shapes[1:3] if operator == "aten::addmm" else shapes[:2]
        batch = math.prod(left[:-2])
        yield (left[-2], left[-1], right[-1]), batch
    elif operator == "aten::mkldnn_rnn_layer":
        (steps, rows, inputs), (gates, hidden) = shapes[0], shapes[2]
        yield (steps * rows, inputs, gates), 1
        yield (rows, hidden, gates), steps
    elif operator == "aten::mkldnn_rnn_layer_backward":
        (steps, rows, inputs), (gates, hidden) = shapes[0], shapes[2]
        yield (steps * rows, gates, inputs), 1
        yield (rows, gates, hidden), steps
        yield (gates, steps * rows, inputs + hidden), 1


@functools.cache
def _mm_seconds(product: Product, dtype: torch.dtype) -> float:
    m, k, n = product
    left, right, out = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.empty(m, n, dtype=dtype)

    def seconds() -> float:
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < _SECONDS:
            torch.mm(left, right, out=out)
            calls += 1
        return (time.perf_counter() - start) / calls

    return statistics.median(seconds() for _ in range(_REPEATS))
