"""What devices can do, by their vendors' data sheets; of this machine's processors what a second of measuring shows.

Peaks are of dense products. Bandwidths are bytes a second, of links in one direction.
"""

from __future__ import annotations

import difflib
import os
import time
from dataclasses import dataclass

import torch

from vae_dist.errors import ConfigError

# Share of a device's memory that a run can use: the rest is the driver's context, and holes between allocations.
USABLE_SHARE = 0.95
_PROBE_WIDTH, _PROBE_BYTES, _PROBE_SECONDS = 1024, 2**26, 0.2


@dataclass(frozen=True)
class Device:
    """One accelerator, or one worker's share of processors.

    Attributes:
        memory_bytes: of the device.
        bf16_flops, fp32_flops: peak products a second, in FLOP/s.
        memory_bandwidth: to its own memory.
        link_bandwidth: to the other devices of its node.
        network_bandwidth: to other nodes, a device's share.
        per_node: devices of a node.
        is_gpu: whether the kernels are a GPU's.
        mfu: assumed share of the peak that a step reaches; an assumption, not a promise of the vendor.
        operator_seconds: assumed, that an operator takes at least: small models are bound by it, not by the peak.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    per_node: int
    is_gpu: bool
    mfu: float
    operator_seconds: float

    def peak(self, autocast: torch.dtype | None) -> float:
        """FLOP/s of the products of a run."""
        return self.bf16_flops if autocast is torch.bfloat16 else self.fp32_flops

    def bandwidth_between(self, workers: int) -> float:
        """Of a ring over so many devices: its slowest link's."""
        return self.link_bandwidth if workers <= self.per_node else self.network_bandwidth


# 0.35 to 0.45 is what well-tuned Transformers of billions of parameters report (Llama 3, 2024, table 4: 0.38 to 0.43 on
# H100); small models, short sequences and LSTMs stay far below it. fp32 products run without TF32, torch's default.
_GPU_MFU = 0.35
# What eager torch and the start of a kernel cost an operator, 5 to 10 microseconds.
_GPU_OPERATOR = 8e-6
_CPU_MFU = 0.5

GPUS = {
    # NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s BF16, 19.5 FP32, 80 GB, 2,039 GB/s, NVLink 600 GB/s in both
    # directions together; DGX A100 data sheet: a 200 Gb/s adapter for each GPU.
    "a100": Device("a100", 80 * 10**9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 8, True, _GPU_MFU, _GPU_OPERATOR),
    # NVIDIA H100 SXM data sheet: 1,979 TFLOP/s BF16 with sparsity, half of it dense, 67 FP32, 80 GB, 3.35 TB/s, NVLink
    # 900 GB/s; DGX H100 data sheet: a 400 Gb/s adapter for each GPU.
    "h100": Device("h100", 80 * 10**9, 989.5e12, 67e12, 3.35e12, 450e9, 50e9, 8, True, _GPU_MFU, _GPU_OPERATOR),
    # NVIDIA H200 SXM data sheet: as H100, with 141 GB and 4.8 TB/s; DGX H200 data sheet for the network.
    "h200": Device("h200", 141 * 10**9, 989.5e12, 67e12, 4.8e12, 450e9, 50e9, 8, True, _GPU_MFU, _GPU_OPERATOR),
    # NVIDIA DGX B200 data sheet, of eight GPUs: 1,440 GB and 64 TB/s; HGX B200 table, of eight: 36 PFLOP/s BF16 with
    # sparsity, half of it dense, 600 TFLOP/s FP32; NVLink 1.8 TB/s and a 400 Gb/s adapter for each GPU.
    "b200": Device("b200", 180 * 10**9, 2250e12, 75e12, 8e12, 900e9, 50e9, 8, True, _GPU_MFU, _GPU_OPERATOR),
}  # fmt: skip
NAMES = (*GPUS, "cpu")


def device_named(name: str, workers: int) -> Device:
    """A GPU of the table, or one of `workers` equal shares of this machine, measured."""
    require_known(name)
    return GPUS[name] if name in GPUS else _this_machine(workers)


def local_gpu() -> Device | None:
    """The row of the table for this machine's GPU, where there is one."""
    own = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((device for name, device in GPUS.items() if name in own), None)


def require_known(name: str) -> None:
    """Refuse a name that no device has.

    Raises:
        ConfigError: no device has it.
    """
    if name in NAMES:
        return
    near = difflib.get_close_matches(name.lower(), NAMES, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--device {name}: the estimates know {', '.join(NAMES)}.{hint}")


def _this_machine(workers: int) -> Device:
    """All workers are taken to run here; the link between them is a loopback, measured as half a copy of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    copied = _rate_of_copying()
    return Device(
        name="cpu",
        memory_bytes=memory // workers,
        bf16_flops=_rate_of_products(torch.bfloat16) / workers,
        fp32_flops=_rate_of_products(torch.float32) / workers,
        memory_bandwidth=copied / workers,
        link_bandwidth=copied / 2 / workers,
        network_bandwidth=1.25e9,
        per_node=workers,
        is_gpu=False,
        mfu=_CPU_MFU,
        operator_seconds=0.0,
    )


def _rate_of_products(dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products on all threads."""
    a = torch.ones(_PROBE_WIDTH, _PROBE_WIDTH, dtype=dtype)
    return 2 * _PROBE_WIDTH**3 / _seconds_of(lambda: torch.mm(a, a))


def _rate_of_copying() -> float:
    """Bytes a second, read and written."""
    source, target = torch.ones(2, _PROBE_BYTES, dtype=torch.uint8).unbind(0)
    return 2 * _PROBE_BYTES / _seconds_of(lambda: target.copy_(source))


def _seconds_of(work: object) -> float:
    """The fastest of as many turns as fit into the probe's time."""
    assert callable(work)
    work()
    best, end = float("inf"), time.perf_counter() + _PROBE_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
