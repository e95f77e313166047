"""`python -m vae_dist.train [CONFIG] [key.path=value ...]`: parse, validate, prepare, plan, launch.

Without a configuration it trains on the docstring corpus. The same command again resumes an interrupted run
and answers at once when the run is finished. Progress goes to standard error; the last line of standard
output is one JSON object.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from vae_dist.config.load import load_config
from vae_dist.config.schema import Config
from vae_dist.data.prepare.prepare import prepare_cached
from vae_dist.data.stream.training_data import TrainingData, open_training_data
from vae_dist.engine.plan import RunPlan, claim_run_dir, next_commands, plan_run
from vae_dist.errors import ConfigError, VaeDistError
from vae_dist.launch.prepare import executor
from vae_dist.model.huggingface_checkpoint import require_positions, with_architectures
from vae_dist.observe.console import INTERRUPTED, fail, say, show_log
from vae_dist.observe.preparing import show_preparing
from vae_dist.observe.start_up import StartUp
from vae_dist.observe.versions import versions


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 finished (or saved after a signal), 1 failed, 2 the input is wrong, 130 interrupted."""
    # What was imported by now took seconds, too.
    started_at = psutil.Process().create_time()
    show_log()
    try:
        config = _load(sys.argv[1:] if arguments is None else arguments)
        return run(config, started_at)
    except VaeDistError as error:
        return fail(error)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from what is finished")
        return INTERRUPTED


def plan_only(arguments: Sequence[str]) -> tuple[RunPlan, TrainingData]:
    """The plan of a command line, its data prepared, nothing launched."""
    return _plan(_load(arguments), time.time())


def run(config: Config, started_at: float) -> int:
    """Prepare the data, then train, or say that the run is finished."""
    if "working_dir_files" in Path.cwd().parts and not Path(config.run.storage).is_absolute():
        say(
            f"warning: run.storage = {config.run.storage} lies in the job's unpacked working directory, which Ray "
            "deletes some time after the job. Give an absolute path in storage that all nodes share."
        )
    plan, _ = _plan(config, started_at)
    claim_run_dir(plan, _provenance())
    finished = plan.run_dir / "result.json"
    if finished.exists():
        say(f"{plan.run_dir} is finished; nothing to do. Report: {plan.run_dir / 'report.html'}")
        print(finished.read_text(encoding="utf-8"))
        return 0
    return _launch(plan)


def _load(arguments: Sequence[str]) -> Config:
    """The configuration with what its checkpoints say, and absolute paths, since workers run in another directory.

    Raises:
        ConfigError: the configuration is wrong, or a file or a checkpoint of the model is not there.
    """
    config = load_config(*_split_arguments(arguments))
    model = with_architectures(config.model)
    if model.embedding_vectors is not None:
        path = Path(model.embedding_vectors).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(
                f"model.embedding_vectors: there is no file {path}. Give a GloVe text file, such as glove.6B.50d.txt."
            )
        model = model.model_copy(update={"embedding_vectors": str(path)})
    return config.model_copy(update={"model": model})


def _plan(config: Config, started_at: float) -> tuple[RunPlan, TrainingData]:
    """The run, its data prepared."""
    dirs = _data_dirs(config)
    data = open_training_data(dirs, config)
    require_positions(config.model, data.max_tokens)
    return plan_run(config, data, dirs, started_at), data


def _launch(plan: RunPlan) -> int:
    start_up = StartUp(plan.started_at)
    start_up.mark("configuration and data")
    # Ray takes seconds to import: not for a mistyped key or a finished run.
    from vae_dist.launch.cluster import connect, size_worker_group
    from vae_dist.launch.trainer import fit

    say(f"run {plan.run_dir}: {plan.total_steps} steps of {plan.config.train.batch_sequences} sequences")
    connect()
    start_up.mark("Ray")
    outcome = fit(plan, size_worker_group(plan.config), start_up)
    if outcome.result is None:
        say(f"saved at step {outcome.steps} of {plan.total_steps}; the same command resumes")
        print(json.dumps({"run_dir": str(plan.run_dir), "steps": outcome.steps, "finished": False}))
        return 0
    _say_next(plan)
    print(json.dumps(outcome.result))
    return 0


def _say_next(plan: RunPlan) -> None:
    say(f"\nreport: {plan.run_dir / 'report.html'}\nnext:")
    for command in next_commands(plan):
        say(f"  {command}")


def _data_dirs(config: Config) -> list[str]:
    """The data set directories that the configuration names, or the one that its source is prepared into."""
    given = list(config.data.mixture or {}) or ([config.data.dir] if config.data.dir else [])
    if given:
        # Workers run in another working directory: a local path must be absolute.
        return [path if "://" in path else str(Path(path).expanduser().resolve()) for path in given]
    storage = Path(config.run.storage).resolve()
    source, options = config.data.source, config.data.prepare
    _, path = prepare_cached(source, options, storage / "data", run=executor(), progress=show_preparing())
    return [str(path)]


def _provenance() -> dict[str, Any]:
    return {
        "git_sha": _git_sha(),
        "versions": versions(),
        "driver_host": socket.gethostname(),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_sha() -> str | None:
    """The checkout's commit; None where there is no checkout or no git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The configuration file, if the first argument is one, and the overrides."""
    if arguments and "=" not in arguments[0]:
        if arguments[0] in ("-h", "--help"):
            print(__doc__)
            raise SystemExit(0)
        return arguments[0], list(arguments[1:])
    return None, list(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
