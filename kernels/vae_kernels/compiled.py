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
    fast, failed = torch.compile(function, dynamic=True), False

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                return fast(*arguments, **options)
            except RuntimeError as error:
                failed = True
                _LOG.warning(
                    "%s runs several times slower than it could: torch could not compile it (%s). Install a C++ "
                    "compiler (g++).",
                    function.__qualname__,
                    str(error).strip().splitlines()[0],
                )
        return function(*arguments, **options)

    return call
