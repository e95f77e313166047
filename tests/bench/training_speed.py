"""The whole training step: ours, the loop that a user of PyTorch would write, and that loop compiled, in one run.

    make bench ARGS="--models lstm_256 --batch-sequences 32 --turns 5"

All contenders have the same model (their losses are compared first), the same data and the same cores; they take turns,
A B C ... A B C ..., and medians are compared. Speeds are real target tokens per second. The last line of output is one
JSON object; the status is 1 when the losses differ or, with `--check FILE`, a ratio is over 15 % below the one that
was written there before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
sys.path[:0] = [str(_HERE), str(_ROOT), str(_ROOT / "kernels")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from steps.bare import BareLoop  # noqa: E402
from steps.command import add_corpus, run_like_a_worker  # noqa: E402
from steps.corpus import prepare  # noqa: E402
from steps.gate import WrongModelError, give_weights, require_same_loss  # noqa: E402
from steps.memory import peak_mebibytes  # noqa: E402
from steps.models import MODELS  # noqa: E402
from steps.ours import PARTS, OurRun  # noqa: E402
from steps.plain import PlainLoop, plain_model  # noqa: E402
from steps.products import measure_products  # noqa: E402
from steps.report import check, table  # noqa: E402
from steps.turn import take_turn  # noqa: E402

LOOPS = {
    "loop_fp32": (None, False),
    "loop_bf16": (torch.bfloat16, False),
    "loop_bf16_compiled": (torch.bfloat16, True),
}
"""Name -> autocast dtype, and whether it is compiled."""
_SPLIT_STEPS, _MIN_STEPS = 8, 2


def main() -> int:
    """Measure and print; the process's status."""
    options = _parse()
    torch.set_num_threads(options.threads)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/group", rank=0, world_size=1)
        data_dir = prepare(options.data, options.cache)
        if options.memory_of:
            print(json.dumps(peak_mebibytes(lambda: _contenders(options, data_dir, Path(scratch))[options.memory_of])))
            return 0
        found = []
        try:
            for model in options.models:
                for batch_sequences in options.batch_sequences:
                    print(f"{model}, {batch_sequences} sequences ...", file=sys.stderr, flush=True)
                    options.model, options.batch = model, batch_sequences
                    found.append(_measure(options, data_dir, Path(scratch)))
                    print(table(found[-1:]), flush=True)
        except WrongModelError as error:
            print(f"error: the contenders are not the same model, so nothing is timed: {error}", file=sys.stderr)
            return 1
    result = {"threads": options.threads, "turns": options.turns, "results": found}
    print(json.dumps(result))
    return check(result, options.check) if options.check else 0


def _measure(options: argparse.Namespace, data_dir: Path, storage: Path) -> dict[str, Any]:
    contenders = _contenders(options, data_dir, storage)
    ours = contenders["ours"]
    assert isinstance(ours, OurRun)
    timed = {**contenders, "bare": BareLoop(ours)}
    for contender in timed.values():
        take_turn(contender.step, 0.0, 2)
    speeds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.turns):
        for name, contender in timed.items():
            speeds[name].append(take_turn(contender.step, options.seconds, _MIN_STEPS).tokens_per_second)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    products = measure_products(ours.step, ours.dtype or torch.float32)
    split = ours.split(_SPLIT_STEPS)
    bare = median.pop("bare")
    return {
        "model": options.model,
        "batch_sequences": options.batch,
        "precision": "bf16" if ours.dtype else "fp32",
        "tokens_per_second": {name: round(value, 1) for name, value in median.items()},
        **{f"ratio_{name}": round(median["ours"] / median[name], 3) for name in LOOPS if name in median},
        "matmul_fraction": round(products.fraction, 3),
        "matmul_rate_fraction": round(products.rate_fraction, 3),
        "overhead_fraction": round(1.0 - median["ours"] / bare, 3),
        "split_ms": {part: round(1e3 * split[part], 2) for part in PARTS},
        "peak_memory_mib": {} if options.no_memory else _memory(options, list(median)),
    }


def _contenders(options: argparse.Namespace, data_dir: Path, storage: Path) -> dict[str, OurRun | PlainLoop]:
    """Ours and the loops, from the same weights; the plain model's loss has been compared with ours."""
    name = f"{options.model}-{options.batch}"
    ours = OurRun(data_dir, storage, name, MODELS[options.model], options.batch)
    found: dict[str, OurRun | PlainLoop] = {"ours": ours}
    split = ours.run.dataset.split("train")
    sequences = list(split.read(0, split.sequences))
    for loop, (dtype, is_compiled) in LOOPS.items():
        if loop not in options.loops:
            continue
        plain = plain_model(ours.run.config.model, ours.run.dataset.tokenizer.vocab_size)
        give_weights(plain, ours.vae)
        if loop == options.loops[0]:
            ours.vae.eval()
            require_same_loss(plain, ours.vae, ours.next_batches(1)[0][0])
        rate = ours.run.config.optimizer.learning_rate
        found[loop] = PlainLoop(plain, sequences, options.batch, dtype, learning_rate=rate, is_compiled=is_compiled)
    return found


def _memory(options: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """Peak memory of each contender in a process of its own."""
    import subprocess

    found = {}
    for name in names:
        command = [sys.executable, __file__, "--models", options.model, "--batch-sequences", str(options.batch)]
        command += ["--threads", str(options.threads), "--data", str(options.data), "--cache", str(options.cache)]
        command += ["--memory-of", name, "--loops", *([name] if name in LOOPS else [])]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(out.strip().splitlines()[-1])
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch-sequences", type=int, nargs="+", default=[32, 128])
    parser.add_argument(
        "--loops", nargs="*", choices=list(LOOPS), default=list(LOOPS), help="what ours is compared with"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a turn (default 10)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each contender (default 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    add_corpus(parser)
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail when a ratio fell below that result's")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model, options.batch = options.models[0], options.batch_sequences[0]
    return options


if __name__ == "__main__":
    run_like_a_worker(main)
