"""Which implementation runs: Triton kernels or torch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch

_LOG = logging.getLogger("vae_kernels")
BACKENDS = ("auto", "triton", "torch")


def resolve_backend(backend: str, tensor: torch.Tensor) -> str:
    """The backend that handles `tensor`: "triton" or "torch". The first use of each reason is logged.

    Args:
        backend: "auto" takes Triton for half and single precision on CUDA and torch for the rest; "triton"
            and "torch" insist.
        tensor: the operation's main input; its device and dtype decide.

    Raises:
        ValueError: unknown name.
        RuntimeError: "triton" was insisted on where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "torch":
        choice, reason = "torch", "asked for"
    elif backend == "triton":
        problem = _why_not_triton(tensor)
        if problem is not None:
            raise RuntimeError(f"backend='triton' cannot run here: {problem}")
        choice, reason = "triton", "asked for"
    else:
        choice, reason = _automatic(tensor)
    if not torch.compiler.is_compiling():
        _log_once(choice, reason)
    return choice


def _automatic(tensor: torch.Tensor) -> tuple[str, str]:
    # TRITON_INTERPRET alone must not slow down a run on the CPU: the interpreter has to be asked for by name.
    if tensor.device.type != "cuda":
        return "torch", f"automatic: tensors on {tensor.device.type}"
    problem = _why_not_triton(tensor)
    return ("triton", "automatic: tensors on cuda") if problem is None else ("torch", f"automatic: {problem}")


def _why_not_triton(tensor: torch.Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; install the version your torch is built for"
    if tensor.dtype == torch.float64:
        return "the Triton kernels take float16, bfloat16 and float32, not float64; use backend='torch'"
    if tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device)[0] < 8:
        return "the Triton kernels need a GPU of compute capability 8.0 (Ampere) or later"
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"the tensors are on {tensor.device.type} and Triton compiles for CUDA; move them to a GPU, use "
            "backend='auto' or 'torch', or set TRITON_INTERPRET=1 before Python starts to run the kernels in "
            "Triton's (slow) interpreter"
        )
    return None


@contextlib.contextmanager
def on_device_of(tensor: torch.Tensor) -> Iterator[None]:
    """Within, kernels go to the tensor's GPU, and autocast changes no dtype that was chosen."""
    # Triton launches on the current device, whatever its arguments are on.
    with torch.cuda.device_of(tensor), torch.autocast(tensor.device.type, enabled=False):
        yield


@functools.cache
def _log_once(choice: str, reason: str) -> None:
    _LOG.info("backend %s (%s)", choice, reason)
