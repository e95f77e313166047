"""Which implementation runs an op: Triton kernels or torch operators."""

from __future__ import annotations

import functools
import logging
import os

import torch

logger = logging.getLogger("vae_kernels")
BACKENDS = ("auto", "triton", "torch")


def resolve_backend(backend: str, tensor: torch.Tensor) -> str:
    """`triton` or `torch` for tensors like this one; logged once for each choice and reason.

    `auto` is Triton on CUDA tensors and torch elsewhere. Asking for Triton on a CPU works only in Triton's
    interpreter, which is for tests.

    Raises:
        ValueError: unknown name.
        RuntimeError: Triton was asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    on_gpu = tensor.device.type == "cuda"
    if backend == "auto":
        chosen, reason = ("triton", "the tensors are on a GPU") if on_gpu else ("torch", "the tensors are on a CPU")
    else:
        chosen, reason = backend, "it was asked for"
    if chosen == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "backend='triton' needs CUDA tensors; on a CPU it runs only in the interpreter: set TRITON_INTERPRET=1 "
            "before Python starts, or use backend='torch'."
        )
    _log_once(chosen, reason)
    return chosen


@functools.cache
def _log_once(chosen: str, reason: str) -> None:
    logger.info("vae_kernels uses the %s backend: %s", chosen, reason)
