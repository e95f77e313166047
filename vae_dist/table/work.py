"""A row's work: training and evaluation as processes of their own, and the row that they come to."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from vae_dist.errors import RunError
from vae_dist.observe.metrics import read_metrics
from vae_dist.table.definition import Evaluation
from vae_dist.table.jobs import Job

# Samples and reconstructions that are kept; of interpolations there are two.
_SHOWN = 10
TRAIN = (sys.executable, "-m", "vae_dist.train")
EVALUATE = (sys.executable, "-m", "vae_dist", "eval")


def train(job: Job) -> dict[str, Any] | None:
    """Train, or go on with it; returns the run's result, or None when a signal stopped it and it is saved.

    Raises:
        RunError: it failed; its own message is on standard error.
        KeyboardInterrupt: it was interrupted before there was anything to save.
    """
    outcome, stopped = _run([*TRAIN, *job.arguments], f"Training {job.label}")
    return None if stopped or not outcome.get("finished", True) else outcome


def evaluate(job: Job, evaluation: Evaluation, trained: dict[str, Any]) -> dict[str, Any]:
    """What `vae-dist eval` prints for the run's model; raises as `train` does."""
    flags = _evaluation_flags(job, evaluation)
    if evaluation.texts:
        page = job.run_dir / "evaluation.html"
        # Of an evaluation that was interrupted.
        page.unlink(missing_ok=True)
        flags += ["--page", str(page)]
    command = [*EVALUATE, str(job.run_dir), trained["data_dir"], *flags]
    outcome, stopped = _run(command, f"Evaluating {job.label}")
    if stopped:
        raise KeyboardInterrupt
    return outcome


def result_row(job: Job, evaluation: Evaluation, trained: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
    """The row of the results file: nats per sequence, perplexities per token, null where there is no latent."""
    run = json.loads((job.run_dir / "run.json").read_text(encoding="utf-8"))
    records = read_metrics(job.run_dir)
    steps = [r for r in records if r["kind"] == "train"]
    latent = ("iw_ppl", "kl_per_seq", "mutual_information_nats", "active_units")
    figures = {name: evaluated.get(name) if job.has_latent else None for name in latent}
    return {
        "method": job.row.method,
        "seed": job.seed,
        "elbo_ppl": evaluated["ppl"],
        "iw_ppl": figures["iw_ppl"],
        "split": evaluation.split,
        "importance_samples": _importance_samples(job, evaluation),
        "prior": evaluated["prior"],
        "rec_per_seq": evaluated["rec_per_seq"],
        **{name: figures[name] for name in latent[1:]},
        "sequences": evaluated["sequences"],
        "tokens": evaluated["tokens"],
        "valid": trained["valid"],
        "epochs": round(steps[-1]["epoch"], 4),
        "tokens_seen": trained["tokens_seen"],
        "parameters": _last(records, "parameters"),
        "seconds": round(_step_seconds(steps), 1),
        "precision": _last(records, "precision"),
        "command": f"{job.command} && {_evaluation_command(job, evaluation, Path(trained['data_dir']))}",
        "git_sha": run["git_sha"],
        "manifest_hash": run["manifest_hash"],
    }


def texts_of(evaluated: dict[str, Any]) -> dict[str, Any] | None:
    """What an evaluation says of the texts a model writes, ten of each uncut; None where it wrote none."""
    if "samples" not in evaluated:
        return None
    found = {
        "samples": evaluated["samples"]["texts"][:_SHOWN],
        "sample_quality": evaluated.get("sample_quality"),
        "ngram_baselines": evaluated["ngram_baselines"],
    }
    for name in ("reconstruction", "interpolation"):
        if name in evaluated:
            found[name] = {**evaluated[name], "examples": evaluated[name]["examples"][:_SHOWN]}
    return found


def steps_so_far(job: Job) -> tuple[int, int] | None:
    """Steps logged and steps in all; None when the run logged none yet."""
    steps = [r for r in read_metrics(job.run_dir) if r["kind"] == "train"]
    if not steps:
        return None
    step, epoch = steps[-1]["step"], steps[-1]["epoch"]
    return step, job.config.train.steps or max(1, round(job.config.train.epochs * round(step / epoch)))


def _importance_samples(job: Job, evaluation: Evaluation) -> int:
    return evaluation.importance_samples if job.has_latent else 0


def _evaluation_flags(job: Job, evaluation: Evaluation) -> list[str]:
    numbers = {
        "--importance-samples": _importance_samples(job, evaluation),
        "--batch-sequences": evaluation.batch_sequences,
    }
    prior = ["--prior", "fitted"] if job.config.model.sampling_components else []
    flags = ["--split", evaluation.split, *(str(part) for pair in numbers.items() for part in pair), *prior]
    return flags if evaluation.precision == "fp32" else [*flags, "--precision", evaluation.precision]


def _evaluation_command(job: Job, evaluation: Evaluation, data_dir: Path) -> str:
    """As typed in a shell, without this machine's places."""
    storage = job.run_dir.parent
    inside = data_dir.is_relative_to(storage)
    data = f"runs/{data_dir.relative_to(storage)}" if inside else f"$VAE_DIST_DATA/{data_dir.name}"
    return f"vae-dist eval runs/{job.run_dir.name} {data} {shlex.join(_evaluation_flags(job, evaluation))}"


def _last(records: list[dict[str, Any]], name: str) -> Any:
    """The newest value of what a run says about itself when it starts."""
    return next((r[name] for r in reversed(records) if name in r), None)


def _step_seconds(steps: list[dict[str, Any]]) -> float:
    """Seconds in training steps, over all restarts; validations and saves left out."""
    before = [0, *(r["step"] for r in steps)]
    return sum(r["step_seconds"] * (r["step"] - begin) for r, begin in zip(steps, before, strict=False))


def _run(command: Sequence[str], what: str) -> tuple[dict[str, Any], bool]:
    """The last line of a command's standard output, and whether a signal arrived meanwhile. Main thread only.

    SIGINT and SIGTERM are passed on to it and it is waited for, so that a training can save. It has a process group
    of its own: a terminal's Ctrl-C would otherwise reach it twice, and the second makes a training stop at once.
    """
    received: list[int] = []
    process: subprocess.Popen[str] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, process_group=0
        )
        out, _ = process.communicate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = process.returncode
    if status and received:
        raise KeyboardInterrupt
    lines = out.strip().splitlines()
    if status or not lines:
        raise RunError(f"{what} ended with status {status}; see above. The same command goes on from what is finished.")
    outcome: dict[str, Any] = json.loads(lines[-1])
    return outcome, bool(received)
