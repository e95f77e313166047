"""Speed, memory and error of vae_kernels beside other ways to the same results, in one run, in turns.

    python kernels/benchmarks/run.py --json
    python kernels/benchmarks/run.py --shapes 512,512,10000 --only eager_fp32 ours_bf16 --repeats 3

Needs torch, and Triton on a GPU. Ours is compared with float64 first, and nothing is timed when it is wrong. The last
line of standard output is one JSON object; the table goes before it, or to standard error with --json. Status 1: one of
our kernels is wrong; 2: the input is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
# A checkout that is not installed finds its own package.
for _folder in (_HERE, _HERE.parent):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

import gaussian_benchmark  # noqa: E402
import loss_benchmark  # noqa: E402
import torch  # noqa: E402
import training_step  # noqa: E402
from contender import TASKS  # noqa: E402
from contenders import contenders  # noqa: E402
from correctness import WrongKernelError  # noqa: E402
from machine import describe  # noqa: E402
from problem import Shape, parse_shape  # noqa: E402
from report import loss_entry, table  # noqa: E402

PARTS = ("linear_cross_entropy", "gaussian_rsample_kl", "training_step")
SHAPES = {
    "cpu": [Shape(2048, 512, 10000), Shape(4096, 768, 32768), Shape(512, 512, 10000), Shape(512, 512, 128000)],
    "cuda": [
        Shape(8192, 768, 50304),
        Shape(2048, 4096, 32000),
        Shape(2048, 2048, 102400),
        Shape(4096, 1024, 131072),
        Shape(4096, 2048, 131072),
        Shape(4096, 4096, 131072),
        Shape(4096, 4096, 128256),
        Shape(8192, 4096, 128256),
        Shape(8192, 2304, 256000),
        Shape(16384, 2048, 248320),
    ],
}
_REPEATS = {"cpu": 5, "cuda": 20}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the process's status."""
    options = _parse(arguments)
    try:
        result = measure(options)
    except WrongKernelError as error:
        print(f"error: a kernel is wrong, so nothing is timed\n{error}", file=sys.stderr)
        print(json.dumps({"wrong": [line.strip() for line in str(error).splitlines()]}))
        return 1
    print(table(result), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts that were asked for."""
    device, repeats = options.device, options.repeats
    result: dict[str, Any] = {"machine": describe(device), "repeats": repeats} | {part: [] for part in PARTS}
    if "linear_cross_entropy" in options.parts:
        for shape in options.shapes:
            found = loss_benchmark.measure(
                shape, device, options.only, tuple(options.tasks), repeats, not options.no_memory
            )
            result["linear_cross_entropy"] += [loss_entry(device, shape, name, task) for name, task in found.items()]
    if "gaussian_rsample_kl" in options.parts:
        result["gaussian_rsample_kl"].append(gaussian_benchmark.measure(device, repeats))
    if "training_step" in options.parts:
        result["training_step"].append(training_step.measure(device, repeats))
    return result


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the table goes to standard error")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="N,H,V", help="rows, hidden, vocabulary")
    parser.add_argument("--repeats", type=int, help=f"turns of each contender (default {_REPEATS})")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders for linear_cross_entropy")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help=f"default: all on a GPU, {PARTS[0]} on a CPU")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON object there")
    options = parser.parse_args(arguments)
    _complete(options, parser)
    return options


def _complete(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill the defaults that depend on the device; end with status 2 and a message where something does not fit."""
    has_gpu = torch.cuda.is_available()
    options.device = options.device or ("cuda" if has_gpu else "cpu")
    if options.device == "cuda" and not has_gpu:
        parser.error("--device cuda: torch sees no GPU here; use --device cpu")
    options.shapes = options.shapes or SHAPES[options.device]
    options.repeats = _REPEATS[options.device] if options.repeats is None else options.repeats
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least one turn is needed")
    options.parts = options.parts or (list(PARTS) if options.device == "cuda" else [PARTS[0]])
    names = [contender.name for contender in contenders(options.device)]
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: on {options.device} there are {', '.join(names)}")
    options.only = options.only or names
    if options.out is not None and not options.out.resolve().parent.is_dir():
        parser.error(f"--out {options.out}: the folder does not exist; make it first")


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three positive integers N,H,V") from None


if __name__ == "__main__":
    sys.exit(main())
