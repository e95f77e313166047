"""What the numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PEERS = ("liger-kernel", "cut-cross-entropy", "quack-kernels")


def describe(device: str) -> dict[str, Any]:
    """Versions, processor and, for "cuda", the GPU and its driver; None where it is not known."""
    flags = _cpu_field("flags") or ""
    found: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": _cpu_field("model name") or platform.processor() or None,
        "threads": torch.get_num_threads(),
        # Of all that runs here, before this does: other work makes times long and ratios noisy.
        "load_average": round(os.getloadavg()[0], 2),
        "amx": "amx_bf16" in flags.split(),
        "avx512_bf16": "avx512_bf16" in flags.split(),
    }
    return found | _gpu() if device == "cuda" else found


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **{name: _version(name) for name in _PEERS},
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0] if done.stdout.split() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_field(name: str) -> str | None:
    """First value of a field of /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == name), None)
