"""A model of the times on a GPU from counted FLOP and bytes. NOT A MEASUREMENT.

    python kernels/benchmarks/model.py

N rows, H hidden, V vocabulary, bfloat16. One matrix product of the loss is 2 N H V FLOP; loss and gradients need three.
Bytes are counted only where nothing else can run meanwhile: a pass over the N V logits on their own. What the matrix
products themselves read and write hides behind their arithmetic down to H of about 300.

    design                 FLOP       bytes    extra memory beyond inputs and gradients
    two-pass chunked       6 N H V    6 N V    2 C V, with C as in liger-kernel (chunk_mem_const 1)
    one-read chunked       6 N H V    4 N V    2 C V + 4 V H, with C = 4096
    recompute              8 N H V    0        2 C V, with C = 1024
    exp-store (ours)       6 N H V    0        2 N V
    exp-store, bounded     rows that do not fit in 2 GiB are formed again: 2 H V each; the rest as exp-store

The Gaussian sample and its KL (B rows, D dimensions, K samples): forward reads mu and logvar and writes z and five
float32 results; backward reads mu, logvar and the gradients of z and KL and writes two gradients. At B = 512 that is
far less than a launch takes: what counts there is that each direction is one.
"""

from __future__ import annotations

import json
from typing import NamedTuple

GEMM_FLOP_PER_SECOND = 7.0e14
BANDWIDTH_FRACTION = 0.9
BYTES_PER_SECOND = {"H100": 3.35e12, "H200": 4.8e12}
MAX_SAVED_BYTES = 2**31
SHAPES = (
    (8192, 4096, 128256),
    (4096, 4096, 128256),
    (2048, 2048, 102400),
    (2048, 4096, 32000),
    (4096, 4096, 131072),
    (4096, 2048, 131072),
    (4096, 1024, 131072),
    (16384, 2048, 248320),
    (8192, 2304, 256000),
    (8192, 768, 50304),
)
# Per sequence, and per token of 512 sequences of 128.
GAUSSIANS = ((512, 64, 1), (65536, 256, 1))
LABEL = "MODEL, NOT MEASURED"


class Cost(NamedTuple):
    """What one forward and backward takes; extra memory in bytes."""

    flop: float
    bytes: float
    extra: float


def loss_costs(n: int, h: int, v: int, max_saved_bytes: int = MAX_SAVED_BYTES) -> dict[str, Cost]:
    """Cost of each design for N rows, H hidden, V vocabulary; `forward_only` is the loss without gradients."""
    product = 2.0 * n * h * v
    # liger-kernel's rule: the next power of two of N / ceil(V / H).
    liger_rows = min(n, 1 << (-(-n // -(-v // h)) - 1).bit_length())
    saved_rows = min(n, max_saved_bytes // (2 * v))
    return {
        "two_pass_chunked": Cost(3 * product, 6.0 * n * v, 2.0 * liger_rows * v),
        "one_read_chunked": Cost(3 * product, 4.0 * n * v, 2.0 * min(n, 4096) * v + 4.0 * v * h),
        "recompute": Cost(4 * product, 0.0, 2.0 * min(n, 1024) * v),
        "exp_store": Cost(3 * product, 0.0, 2.0 * n * v),
        "exp_store_bounded": Cost(3 * product + 2.0 * (n - saved_rows) * h * v, 0.0, 2.0 * saved_rows * v),
        "forward_only": Cost(product, 0.0, 0.0),
    }


def gaussian_costs(b: int, d: int, k: int) -> dict[str, Cost]:
    """Cost of the two launches; arithmetic is free beside the bytes."""
    parameters, samples = 2.0 * b * d, 2.0 * k * b * d
    results = 4.0 * (2 * b + 2 * k * b + d)
    return {
        "forward": Cost(0.0, 2 * parameters + samples + results, 0.0),
        "backward": Cost(0.0, 2 * parameters + samples + 4.0 * b + 2 * parameters, 0.0),
    }


def milliseconds(cost: Cost, gpu: str) -> float:
    """Arithmetic at the achieved rate, then the bytes at the achieved bandwidth."""
    bandwidth = BANDWIDTH_FRACTION * BYTES_PER_SECOND[gpu]
    return 1e3 * (cost.flop / GEMM_FLOP_PER_SECOND + cost.bytes / bandwidth)


def main() -> None:
    """Print the table and, as the last line, the same as JSON."""
    entries = [_entry(gpu, dict(zip("NHV", shape, strict=True)), loss_costs(*shape))
               for shape in SHAPES for gpu in BYTES_PER_SECOND]  # fmt: skip
    gaussians = [_entry(gpu, dict(zip("BDK", sizes, strict=True)), gaussian_costs(*sizes))
                 for sizes in GAUSSIANS for gpu in BYTES_PER_SECOND]  # fmt: skip
    print(f"{LABEL}: {GEMM_FLOP_PER_SECOND / 1e12:.0f} TFLOP/s in matrix products, {BANDWIDTH_FRACTION:.0%} of "
          f"{', '.join(f'{rate / 1e12} TB/s ({gpu})' for gpu, rate in BYTES_PER_SECOND.items())}")  # fmt: skip
    for title, found, scale in (("loss, ms (extra MiB)", entries, 1.0), ("Gaussian, microseconds", gaussians, 1e3)):
        print(f"\n{title:<28}" + "".join(f"{name:>22}" for name in found[0]["milliseconds"]))
        for entry in found:
            print(_line(entry, scale))
    assumed = {"gemm_flop_per_second": GEMM_FLOP_PER_SECOND, "bandwidth_fraction": BANDWIDTH_FRACTION,
               "bytes_per_second": BYTES_PER_SECOND, "max_saved_bytes": MAX_SAVED_BYTES}  # fmt: skip
    report = {"label": LABEL, "assumed": assumed, "linear_cross_entropy": entries, "gaussian_rsample_kl": gaussians}
    print(json.dumps(report))


def _entry(gpu: str, sizes: dict[str, int], costs: dict[str, Cost]) -> dict:
    return {
        "gpu": gpu,
        **sizes,
        "flop": {name: cost.flop for name, cost in costs.items()},
        "bytes": {name: cost.bytes for name, cost in costs.items()},
        "extra_memory_bytes": {name: cost.extra for name, cost in costs.items()},
        "milliseconds": {name: float(f"{milliseconds(cost, gpu):.5g}") for name, cost in costs.items()},
    }


def _line(entry: dict, scale: float) -> str:
    sizes = " ".join(f"{key}{entry[key]}" for key in "NHVBDK" if key in entry)
    extra = entry["extra_memory_bytes"]
    cells = (
        f"{scale * time:.2f}" + (f" ({extra[name] / 2**20:.0f})" if extra[name] else "")
        for name, time in entry["milliseconds"].items()
    )
    return f"{sizes + ' ' + entry['gpu']:<28}" + "".join(f"{cell:>22}" for cell in cells)


if __name__ == "__main__":
    main()
