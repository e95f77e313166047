"""Every launch that the Triton modules ship, and how to compile it for a GPU that is not here.

The modules' own functions are called with tensors on the CPU; in place of the launch the kernel is compiled with what
Triton's launcher made of the arguments: types, divisibility, ones that became constants, descriptors, tile. A new
kernel is a row in a list below. Sizes that a user's data decide (rows, vocabulary) are no multiples of 16, which is the
harder case; sizes of a model (hidden, latent, embedding) are.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# Run as a script, or from another folder, an uninstalled checkout has to find its own kernels.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import vae_kernels
from vae_kernels import embedding_word_dropout_triton as words
from vae_kernels import gaussian_rsample_kl_triton as gaussian
from vae_kernels import linear_cross_entropy_triton as lce
from vae_kernels import segment_sum_triton as segments
from vae_kernels.linear_cross_entropy_options import Head, LossOptions
from vae_kernels.linear_cross_entropy_rows import Deltas, RowTerms

ARCHITECTURES = (80, 90, 100)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPE_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
# Enough of both that a program has several tiles: a count of 1 would become a constant.
ROWS, VOCAB = 8201, 5003


class Launch(NamedTuple):
    """A call that launches kernels.

    Attributes:
        variant: a readable name of what is compiled.
        dtype: of the tensors that decide the kernel's types.
        call: takes nothing.
        architectures: of which it is shipped.
    """

    variant: str
    dtype: torch.dtype
    call: Callable[[], object]
    architectures: tuple[int, ...] = ARCHITECTURES


class Compiled(NamedTuple):
    """A kernel as one launch has it; `tile` names the tile's sizes and the stages, if the launch does."""

    kernel: str
    dtype: str
    variant: str
    tile: str
    binary: Any


# --- linear cross entropy

PLAIN, CAPPED = LossOptions(), LossOptions(softcap=30.0, logit_scale=1.5)
SMOOTHED = dataclasses.replace(PLAIN, label_smoothing=0.1)
SMOOTHED_CAPPED = dataclasses.replace(CAPPED, label_smoothing=0.1)


def _loss(run: Callable[[Head], None], dtype: torch.dtype, hidden: int, bias: bool, options: LossOptions) -> None:
    x_NH, weight_VH = torch.zeros(ROWS, hidden, dtype=dtype), torch.zeros(VOCAB, hidden, dtype=dtype)
    target_N = torch.zeros(ROWS, dtype=torch.int64)
    run(Head.of(x_NH, weight_VH, torch.zeros(VOCAB) if bias else None, target_N, options))


def _loss_only(head: Head) -> None:
    lce.sweep(head, torch.zeros(head.rows), None)


def _odds_stored(head: Head) -> None:
    lce.sweep(head, torch.zeros(head.rows), lce.workspace(head))


def _deltas(head: Head) -> None:
    term_N = torch.zeros(head.rows)
    lce.deltas(head, RowTerms(*[term_N] * 4), Deltas(*[term_N] * 4), None, None)


# (variant, launch, bias, options). "capped" has a bias and a scale, too. Each sweep launches the rescue kernel as well.
HALF_LOSSES: list[tuple[str, Callable[[Head], None], bool, LossOptions]] = [
    ("loss only", _loss_only, False, PLAIN),
    ("loss only, bias", _loss_only, True, PLAIN),
    ("loss only, bias, smoothed", _loss_only, True, SMOOTHED),
    ("loss only, capped, smoothed", _loss_only, True, SMOOTHED_CAPPED),
    ("odds stored", _odds_stored, False, PLAIN),
    ("odds stored, bias", _odds_stored, True, PLAIN),
    ("odds stored, capped", _odds_stored, True, CAPPED),
    ("deltas, bias", _deltas, True, PLAIN),
    ("deltas, capped", _deltas, True, CAPPED),
]


def _some(*variants: str) -> list[tuple[str, Callable[[Head], None], bool, LossOptions]]:
    return [loss for loss in HALF_LOSSES if loss[0] in variants]


SINGLE_LOSSES = _some(
    "loss only", "loss only, capped, smoothed", "odds stored, bias", "odds stored, capped", "deltas, capped"
)
SMALL_HIDDEN = 768
# (dtype, hidden, architectures, losses): the large tile is of Hopper and later; float16 differs from bfloat16 in the
# names of instructions only.
LOSSES = [
    (BF16, SMALL_HIDDEN, ARCHITECTURES, HALF_LOSSES),
    (BF16, lce.LARGE_HIDDEN, (90, 100), HALF_LOSSES),
    (FP16, SMALL_HIDDEN, (90,), _some("loss only, bias", "deltas, bias")),
    (FP32, SMALL_HIDDEN, ARCHITECTURES, SINGLE_LOSSES),
]


def _linear_cross_entropy() -> list[Launch]:
    return [
        Launch(variant, dtype, partial(_loss, run, dtype, hidden, bias, options), architectures)
        for dtype, hidden, architectures, losses in LOSSES
        for variant, run, bias, options in losses
    ]


# --- Gaussian sample


def _gaussian(dtype: torch.dtype, rows: int, dim: int, samples: int, everything: bool) -> None:
    """`everything`: priors, free bits and all upstream gradients; otherwise those of an ELBO: of z and of the KL."""
    mu_BD, row_B = torch.zeros(rows, dim, dtype=dtype), torch.zeros(rows)
    prior = [torch.zeros(dim, dtype=dtype) if everything else None] * 2
    noise = (torch.zeros(2, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
    arguments = (mu_BD, mu_BD, *prior, *noise, torch.zeros(()) if everything else None, samples, 3)
    rest = [row_B, *[torch.zeros(samples, rows)] * 2] if everything else [None] * 3
    gaussian.forward(*arguments)
    upstream = (torch.zeros(samples, rows, dim, dtype=dtype), row_B, *rest)
    gaussian.backward(*arguments, upstream, (True, True, everything, everything))


# (variant, dtype, rows, dimensions, samples, everything).
GAUSSIANS = [
    ("ELBO", BF16, 129, 64, 1, False),
    ("ELBO, many rows", FP32, gaussian.ROWS_OF_ONE_LAUNCH + 1, 32, 1, False),
    ("everything", BF16, 129, 64, 5, True),
    ("everything, one dimension", FP32, 129, 1, 5, True),
    ("everything, most dimensions", FP32, 129, gaussian._MAX_DIM, 5, True),
]


# --- word dropout and segment sums


def _words(dtype: torch.dtype, embedding: int) -> None:
    sequences, tokens, vocab = 33, 67, 101
    tokens_BT = torch.zeros(sequences, tokens, dtype=torch.int64)
    rng, sample_id_B = torch.zeros(2, dtype=torch.int64), torch.zeros(sequences, dtype=torch.int64)
    noise = (rng, sample_id_B, torch.zeros(()), 3, (0, 1, 2), 1)
    words.forward(tokens_BT, torch.zeros(vocab, embedding, dtype=dtype), *noise)
    words.backward(torch.zeros(sequences, tokens, embedding, dtype=dtype), tokens_BT, *noise, vocab)


def _segments(dtype: torch.dtype) -> None:
    offsets_B1 = torch.zeros(34, dtype=torch.int32)
    segments.total(torch.zeros(ROWS, dtype=dtype), offsets_B1)
    segments.spread(torch.zeros(33, dtype=dtype), offsets_B1, ROWS)


WORDS = [("narrow", FP32, 64), ("wide", FP32, 768), ("wide", BF16, 768)]

LAUNCHES = [
    *_linear_cross_entropy(),
    *(Launch(variant, dtype, partial(_gaussian, dtype, *sizes)) for variant, dtype, *sizes in GAUSSIANS),
    *(Launch(variant, dtype, partial(_words, dtype, embedding)) for variant, dtype, embedding in WORDS),
    *(Launch("int32 offsets", dtype, partial(_segments, dtype)) for dtype in (FP32, BF16)),
]


def shipped_kernels() -> dict[str, set[str]]:
    """The kernels that the package's Triton modules hold, by module; a helper's name begins with an underscore."""
    modules = [info.name for info in pkgutil.iter_modules(vae_kernels.__path__) if info.name.endswith("_triton")]
    return {
        name: {
            key
            for key, value in vars(importlib.import_module(f"vae_kernels.{name}")).items()
            if isinstance(value, JITFunction) and key.endswith("_kernel")
        }
        for name in modules
    }


# --- compiling


class _Device:
    """What a launch asks of Triton's driver; each architecture is a device of its own to Triton's caches."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def tile_name(arguments: dict[str, Any]) -> str:
    """Of a launch's keyword arguments: sizes have one letter each."""
    sizes = [f"{name}{value}" for name, value in arguments.items() if len(name) == 1]
    stages = [f"{arguments['num_stages']} stages"] if "num_stages" in arguments else []
    return ", ".join([" ".join(sizes), *stages])


@contextmanager
def _compiling(architecture: int) -> Iterator[list[tuple[str, str, Any]]]:
    """Within, launches compile; what they compile comes as (kernel, tile, binary)."""
    found: list[tuple[str, str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append((self.__name__, tile_name(kwargs), run(self, *args, grid=grid, warmup=True, **kwargs)))

    with ExitStack() as stack:
        for patch in (
            mock.patch.object(driver, "_active", _Device(architecture)),
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(lce, "has_tma", lambda device: architecture >= 90),
        ):
            stack.enter_context(patch)
        yield found


def compile_all(architecture: int) -> list[Compiled]:
    """Everything shipped for an architecture; what several launches share has the name that the first gives it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 turns kernels into plain Python: unset it to compile them")
    kernels: dict[str, Compiled] = {}
    for launch in LAUNCHES:
        if architecture not in launch.architectures:
            continue
        name = DTYPE_NAMES[launch.dtype], launch.variant
        with _compiling(architecture) as found:
            try:
                launch.call()
            except Exception as error:
                error.add_note(f"in the launch {name}, sm_{architecture}")
                raise
        for kernel, tile, binary in found:
            kernels.setdefault(binary.hash, Compiled(kernel, *name, tile, binary))
    return list(kernels.values())
