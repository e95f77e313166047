"""Importance-weighted likelihood: ours, and the loop over samples that a user of PyTorch would write, in one run.

    python tests/bench/importance_speed.py --models lstm_256 --samples 500

Both score the same sequences under the same weights, and both estimates must agree. The last line of output is one JSON
object; the status is 1 where they do not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(_ROOT), str(_ROOT / "kernels")]

from steps.command import add_corpus, run_like_a_worker  # noqa: E402
from steps.corpus import prepare  # noqa: E402
from steps.gate import give_weights  # noqa: E402
from steps.importance import our_likelihood, plain_likelihood  # noqa: E402
from steps.models import MODELS  # noqa: E402
from steps.ours import OurRun  # noqa: E402
from steps.plain import plain_model  # noqa: E402
from steps.turn import take_turn  # noqa: E402

# Nats per sequence by which two estimates from other samples may differ, as a share of their value.
_TOLERANCE = 0.01


def main() -> int:
    """Measure and print; the process's status."""
    options = _parse()
    torch.set_num_threads(options.threads)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    found, status = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/group", rank=0, world_size=1)
        data_dir = prepare(options.data, options.cache)
        for model in options.models:
            entry = _measure(options, model, data_dir, Path(scratch))
            print(f"{model}: {entry}", file=sys.stderr, flush=True)
            status |= not entry["agrees"]
            found.append(entry)
    print(json.dumps({"threads": options.threads, "samples": options.samples, "results": found}))
    return int(status)


def _measure(options: argparse.Namespace, model: str, data_dir: Path, storage: Path) -> dict[str, Any]:
    ours = OurRun(data_dir, storage, model, MODELS[model], 32)
    # Some steps in, so that the posterior is none of the prior's.
    take_turn(ours.step, 0.0, options.steps)
    vae = ours.run.engine.module.vae.eval()
    plain = plain_model(ours.run.config.model, vae.vocab_size)
    give_weights(plain, vae)
    split = ours.run.dataset.split("valid")
    contenders = {
        "ours": lambda: our_likelihood(vae, split, options.sequences, options.samples, ours.dtype),
        "loop_bf16": lambda: plain_likelihood(plain, split, options.sequences, options.samples, torch.bfloat16),
        "loop_fp32": lambda: plain_likelihood(plain, split, options.sequences, options.samples, None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    nats: dict[str, float] = {}
    for _ in range(options.turns):
        for name, score in contenders.items():
            start = time.perf_counter()
            nats[name] = score()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": model,
        "sequences": options.sequences,
        "iw_nll_per_seq": {name: round(value, 3) for name, value in nats.items()},
        "agrees": all(math.isclose(nats["ours"], value, rel_tol=_TOLERANCE) for value in nats.values()),
        "seconds": {name: round(value, 2) for name, value in median.items()},
        "ratio_loop_bf16": round(median["loop_bf16"] / median["ours"], 3),
        "ratio_loop_fp32": round(median["loop_fp32"] / median["ours"], 3),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--samples", type=int, default=500, help="K (default 500)")
    parser.add_argument("--sequences", type=int, default=32, help="of the validation split, chosen by the seed")
    parser.add_argument("--steps", type=int, default=20, help="training steps before (default 20)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    add_corpus(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_like_a_worker(main)
