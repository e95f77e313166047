"""`vae-dist plan`: what a configuration would do, and what it would cost on some device."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from vae_dist.errors import RunError
from vae_dist.estimate.goodput import MTBF_HOURS


def add_plan_command(commands: Any) -> None:
    """The command's arguments."""
    text = "what a configuration would do, and estimates of its cost; exit status 1: it does not fit"
    one: argparse.ArgumentParser = commands.add_parser("plan", help=text, description=text)
    one.set_defaults(command=plan)
    one.add_argument("config", nargs="*", help="CONFIG and key=value overrides, as for train; before the flags")
    one.add_argument("--workers", metavar="N", help="the same as cluster.workers=N")
    one.add_argument("--device", metavar="NAME", help="h100, h200, b200, a100 or cpu; default: what this machine has")
    one.add_argument("--mfu", type=_positive, help="share of the peak that steps reach; default: assumed")
    one.add_argument("--interconnect-gb", type=_positive, help="GB/s between workers; default: the data sheet's")
    one.add_argument("--storage-gb", type=_positive, default=2.0, help="GB/s that checkpoints are written at")
    one.add_argument("--mtbf-hours", type=_positive, default=MTBF_HOURS, help="between failures of one device")
    one.add_argument("--restart-seconds", type=_not_negative, default=120.0, help="from a failure to the next step")
    one.add_argument("--price-per-device-hour", type=_not_negative, help="in any currency")


def plan(args: argparse.Namespace) -> None:
    """Print plan and estimates; a run that does not fit is a failure, after the numbers."""
    from vae_dist.engine.plan_costs import Question, describe_costs
    from vae_dist.engine.plan_view import describe_plan
    from vae_dist.estimate.devices import require_known
    from vae_dist.train import plan_only

    if args.device:
        require_known(args.device)
    workers = [f"cluster.workers={args.workers}"] if args.workers else []
    planned = plan_only([*args.config, *workers])
    question = Question(
        device=args.device,
        mfu=args.mfu,
        interconnect=args.interconnect_gb and 1e9 * args.interconnect_gb,
        storage=1e9 * args.storage_gb,
        restart_seconds=args.restart_seconds,
        mtbf_hours=args.mtbf_hours,
        price=args.price_per_device_hour,
    )
    numbers = describe_plan(*planned)
    estimate, problem = describe_costs(*planned, question)
    print(json.dumps({**numbers, "estimate": estimate}, ensure_ascii=False))
    if problem:
        raise RunError(problem)


def _positive(text: str) -> float:
    return _number(text, above=0.0)


def _not_negative(text: str) -> float:
    return _number(text)


def _number(text: str, above: float = -1.0) -> float:
    value = float(text)
    if not (value > above and 0.0 <= value < math.inf):
        raise argparse.ArgumentTypeError(f"{text} is not a {'positive ' if above == 0.0 else ''}number")
    return value
