"""Functions of torch compiled for the CPU when they are first used."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

_LOG = logging.getLogger("vae_kernels")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled by torch's inductor, or as it is, with a warning, where there is no working compiler."""
    # torch gives up on a function, without a word to its caller, after eight variants of it: dtypes, absent arguments,
    # sizes of one. It counts over all functions with the same code unless told to isolate them.
    limits: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": 64}
    fast, failed = torch.compile(function, dynamic=True, **limits), False

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                return fast(*arguments, **options)
            except RuntimeError as error:
                # Here, because the import takes a second that only compiling needs.
                from torch._dynamo.exc import TorchDynamoException

                # What the function itself raises, out of memory for one, is not for another try.
                if not isinstance(error, TorchDynamoException):
                    raise
                failed = True
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                _warn_once(
                    f"{function.__qualname__} runs several times slower than it could: torch could not compile it "
                    f"({reason}). Install a C++ compiler (g++)."
                )
        return function(*arguments, **options)

    return call


@functools.cache
def _warn_once(message: str) -> None:
    _LOG.warning(message)
