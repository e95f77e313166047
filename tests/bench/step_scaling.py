"""How the training step grows: with the corpus, with vocabulary, width and batch, and with workers.

    python tests/bench/step_scaling.py [--studies corpus sizes workers] [--turns 5]

Contenders of a study take turns, A B C ... A B C ..., and medians are compared. Tokens are real target tokens, steps
those that a run makes. The last line of output is one JSON object.

- corpus: one configuration on a corpus and on 10 and 100 copies of it in one; peak memory in processes of their own.
- sizes: vocabulary, width and batch, one at a time, with the part of the step that is matrix products.
- workers: two workers of one thread against one of two, 128 sequences each; needs two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
sys.path[:0] = [str(_HERE), str(_ROOT), str(_ROOT / "kernels")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from steps.command import add_corpus, run_like_a_worker  # noqa: E402
from steps.corpus import prepare, prepare_copies  # noqa: E402
from steps.memory import peak_mebibytes  # noqa: E402
from steps.models import MODELS, lstm  # noqa: E402
from steps.ours import OurRun  # noqa: E402
from steps.products import measure_products  # noqa: E402
from steps.team import Team, obey  # noqa: E402
from steps.turn import take_turn  # noqa: E402

COPIES = (1, 10, 100)
VOCABULARIES, WIDTHS, BATCHES = (1_250, 2_500, 5_000, 10_002), (128, 256, 512, 1024), (16, 32, 64, 128)
PUBLISHED = MODELS["lstm_256"]
_MIN_STEPS, _MEMORY_STEPS = 4, 60
_Turn = Callable[[], float]


def main() -> int:
    """Measure and print; the process's status."""
    options = _parse()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, alone)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "MASTER_PORT" in os.environ:
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("gloo", init_method=f"file://{scratch}/group", rank=0, world_size=1)
        if options.member_of:
            batch = 128 * dist.get_world_size()
            obey(OurRun(options.member_of, scratch, "workers", MODELS["lstm_1024"], batch).step, options.seconds)
        elif options.memory_on:
            print(peak_mebibytes(lambda: OurRun(options.memory_on, scratch, "memory", PUBLISHED, 64), _MEMORY_STEPS))
        else:
            print(json.dumps(_measure(options, scratch)))
    return 0


def _measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"threads": options.threads, "turns": options.turns}
    for name in options.studies:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found[name] = STUDIES[name](options, scratch)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
    return found


def _corpus(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    dirs = {copies: prepare_copies(options.data, options.cache, copies) for copies in COPIES}
    runs = {copies: OurRun(path, scratch, f"corpus-{copies}", PUBLISHED, 64) for copies, path in dirs.items()}
    speeds = _medians({copies: _speed(run, options) for copies, run in runs.items()}, options.turns)
    memory = {copies: subprocess.check_output(_again("--memory-on", path), text=True) for copies, path in dirs.items()}
    return [
        {
            "copies": copies,
            "sequences": run.run.dataset.split("train").sequences,
            "tokens_per_second": round(speeds[copies], 1),
            "peak_memory_mib": float(memory[copies].split()[-1]),
        }
        for copies, run in runs.items()
    ]


def _sizes(options: argparse.Namespace, scratch: Path) -> dict[str, list[dict[str, float]]]:
    data = {size: prepare(options.data, options.cache, size) for size in VOCABULARIES}
    whole = data[VOCABULARIES[-1]]
    sweeps = {
        "vocabulary": {v: OurRun(data[v], scratch, f"v{v}", PUBLISHED, 32) for v in VOCABULARIES},
        "width": {h: OurRun(whole, scratch, f"h{h}", lstm(256, h), 32) for h in WIDTHS},
        "batch": {b: OurRun(whole, scratch, f"b{b}", PUBLISHED, b) for b in BATCHES},
    }
    return {name: _sweep(runs, options) for name, runs in sweeps.items()}


def _sweep(runs: dict[int, OurRun], options: argparse.Namespace) -> list[dict[str, float]]:
    milliseconds = _medians({size: _step_milliseconds(run, options) for size, run in runs.items()}, options.turns)
    found = []
    for size, run in runs.items():
        products = measure_products(run.step, run.dtype or torch.float32).fraction
        step = milliseconds[size]
        found.append({"size": size, "step_ms": round(step, 2), "products_ms": round(products * step, 2)})
    return found


def _workers(options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    member = _again("--member-of", prepare(options.data, options.cache), "--seconds", options.seconds)
    with Team([*member, "--threads", "1"], 2) as two, Team([*member, "--threads", "2"], 1) as one:
        speeds = _medians({"two_of_one_thread": two.turn, "one_of_two_threads": one.turn}, options.turns)
    ratio = speeds["two_of_one_thread"] / speeds["one_of_two_threads"]
    return {**{name: round(speed, 1) for name, speed in speeds.items()}, "ratio": round(ratio, 3)}


STUDIES: Mapping[str, Callable[[argparse.Namespace, Path], Any]] = {
    "corpus": _corpus,
    "sizes": _sizes,
    "workers": _workers,
}


def _speed(run: OurRun, options: argparse.Namespace) -> _Turn:
    return lambda: take_turn(run.step, options.seconds, _MIN_STEPS).tokens_per_second


def _step_milliseconds(run: OurRun, options: argparse.Namespace) -> _Turn:
    def turn() -> float:
        made = take_turn(run.step, options.seconds, _MIN_STEPS)
        return 1e3 * made.seconds / made.steps

    return turn


def _medians(turns: Mapping[Any, _Turn], rounds: int) -> dict[Any, float]:
    """Of so many turns of each, after one that does not count."""
    found: dict[Any, list[float]] = {name: [] for name in turns}
    for _ in range(rounds + 1):
        for name, turn in turns.items():
            found[name].append(turn())
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def _again(*arguments: object) -> list[str]:
    """The command of a process that does a part."""
    return [sys.executable, __file__, *map(str, arguments)]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a turn (default 5)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each contender (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="of corpus and sizes (default 1)")
    add_corpus(parser)
    parser.add_argument("--memory-on", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--member-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run_like_a_worker(main)
