"""What a run will do, derived from its configuration and data before anything is launched."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_dist.config.credentials import place, without_credentials
from vae_dist.config.load import canonical_json, dump_yaml
from vae_dist.config.schema import RESULT_SECTIONS, Config
from vae_dist.config.science_checks import cycle_problem
from vae_dist.data.stream.training_data import TrainingData
from vae_dist.errors import CheckpointError, ConfigError, DataError
from vae_dist.objective.schedule import phases

_REPORTS_PER_RUN = 10


@dataclass(frozen=True)
class RunPlan:
    """Everything a worker needs, small enough to ship to each.

    Attributes:
        data_dirs: the data set, or those of a mixture; the first is evaluated.
        result_hash: names everything that changes the trained weights.
        total_steps: optimizer steps of the run.
        started_at: when the command was given, seconds since the epoch.
    """

    config: Config
    run_dir: Path
    data_dirs: tuple[str, ...]
    manifest_hash: str
    result_hash: str
    splits: tuple[str, ...]
    total_steps: int
    steps_per_epoch: int
    evaluate_every: int
    checkpoint_every: int
    started_at: float

    @property
    def data_dir(self) -> str:
        """The data set that is evaluated."""
        return self.data_dirs[0]


def plan_run(config: Config, data: TrainingData, data_dirs: Sequence[str], started_at: float) -> RunPlan:
    """Fix the run's steps, intervals and directory.

    Raises:
        DataError: the data set does not fit the configuration.
    """
    budget = config.train.micro_batch_tokens
    if budget is not None and budget < data.max_tokens:
        raise DataError(
            f"train.micro_batch_tokens = {budget} cannot hold the longest training sequence of "
            f"{', '.join(data_dirs)}, {data.max_tokens} tokens. Raise it to at least that."
        )
    _require_validation(config, data)
    _require_latents(config, data)
    steps_per_epoch = data.windows.steps_per_epoch
    total = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
    evaluate_every = config.evaluate.every_steps or max(1, -(-total // _REPORTS_PER_RUN))
    problem = cycle_problem(config, total) or _plateau_problem(config, total, evaluate_every)
    if problem:
        raise ConfigError(problem)
    result_hash = _result_hash(config, data.manifest_hash)
    return RunPlan(
        config=config,
        run_dir=Path(config.run.storage).resolve() / (config.run.name or f"run-{result_hash[:12]}"),
        data_dirs=tuple(data_dirs),
        manifest_hash=data.manifest_hash,
        result_hash=result_hash,
        splits=tuple(data.datasets[0].splits),
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        evaluate_every=evaluate_every,
        checkpoint_every=config.run.checkpoint_every_steps or max(1, -(-total // _REPORTS_PER_RUN)),
        started_at=started_at,
    )


def _require_validation(config: Config, data: TrainingData) -> None:
    if "valid" in data.datasets[0].splits:
        return
    needing = {
        "optimizer.schedule = plateau": config.optimizer.schedule == "plateau",
        "objective.aggressive": config.objective.aggressive is not None,
        "evaluate.select = best": config.evaluate.select == "best",
    }
    wanted = [name for name, needed in needing.items() if needed]
    if wanted:
        raise DataError(
            f"{' and '.join(wanted)} {'follow' if len(wanted) > 1 else 'follows'} the validation, and the data set has "
            "no validation split. Prepare it with valid_fraction above 0, or cut one with `vae-dist data split`."
        )


def _plateau_problem(config: Config, total_steps: int, evaluate_every: int) -> str | None:
    """Why a plateau can never be found, or None."""
    plateau, last = config.optimizer.plateau, phases(total_steps, config.objective)[-1]
    validations = -(-total_steps // evaluate_every) - last.first_step // evaluate_every
    if config.optimizer.schedule != "plateau" or validations > plateau.first_validation + plateau.patience:
        return None
    return (
        f"optimizer.schedule = plateau waits for validation {plateau.first_validation} and then for {plateau.patience} "
        f"without improvement, and the run has {validations}: the learning rate would stay as it is. Validate more "
        "often (evaluate.every_steps), or lower optimizer.plateau.first_validation."
    )


def _require_latents(config: Config, data: TrainingData) -> None:
    wanted, sequences = config.model.sampling_components, data.datasets[0].split("train").sequences
    # A tenth is held out of the fit.
    if wanted > 0.9 * sequences:
        raise DataError(
            f"model.sampling_components = {wanted} Gaussians cannot be fitted to the latents of {sequences} training "
            f"sequences, of which a tenth is held out. Use at most {int(0.9 * sequences)}."
        )


def claim_run_dir(plan: RunPlan, provenance: dict[str, Any]) -> None:
    """Create the run directory, or check that the one there belongs to this configuration and data.

    Raises:
        CheckpointError: the directory holds another run; names the keys that differ.
    """
    record = plan.run_dir / "run.json"
    if record.exists():
        try:
            there = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            raise CheckpointError(f"{record} is not readable. Restore it, or use another run.name.") from None
        if there["result_hash"] != plan.result_hash:
            raise CheckpointError(
                f"{plan.run_dir} belongs to another run: {_differences(there, plan)}. Use another run.name (or null, "
                "which names the run by its configuration), or restore those values to resume it."
            )
        _require_place(there, plan)
        return
    # resolved.yaml alone is what a claim interrupted half way leaves.
    if plan.run_dir.exists() and any(p.name not in ("resolved.yaml", "run.tmp") for p in plan.run_dir.iterdir()):
        raise CheckpointError(f"{plan.run_dir} is not empty and holds no run. Use another run.name or run.storage.")
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    (plan.run_dir / "resolved.yaml").write_text(dump_yaml(plan.config), encoding="utf-8")
    identity = {
        "result_hash": plan.result_hash,
        "manifest_hash": plan.manifest_hash,
        "result_config": _result_config(plan.config),
        "data_dir": without_credentials(plan.data_dir),
        "checkpoints": _checkpoints(plan),
        **provenance,
    }
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    os.replace(temporary, record)


def _require_place(there: dict[str, Any], plan: RunPlan) -> None:
    """Elsewhere there are no checkpoints: the run would begin again, and write over those that it has."""
    before, now = there.get("checkpoints", _checkpoints(plan)), _checkpoints(plan)
    if before != now:
        raise CheckpointError(
            f"{plan.run_dir} keeps its checkpoints in {before}, and run.checkpoint_url now means {now}. Restore it "
            "to resume the run, or use another run.name."
        )


def _checkpoints(plan: RunPlan) -> str:
    url = plan.config.run.checkpoint_url
    return "its directory" if url is None else place(url)


def next_commands(plan: RunPlan) -> list[str]:
    """What a person would do now; absolute paths, fit for a shell."""
    model, data = shlex.quote(str(plan.run_dir / "model")), shlex.quote(without_credentials(plan.data_dir))
    split = next(name for name in ("test", "valid", "train") if name in plan.splits)
    interpolate = f"vae-dist interpolate {model} 'Return the number of rows.' 'Raise an error if the file is missing.'"
    return [
        f"vae-dist eval {model} {data} --split {split} --importance-samples 100",
        f"vae-dist sample {model} --num 10",
        *([interpolate] if plan.config.model.latent != "none" else []),
        f"vae-dist serve {model}",
    ]


def _result_config(config: Config) -> dict[str, Any]:
    """The part of the configuration that changes the trained weights.

    Where the data came from is left out: the manifest hash says what it is. So is what happens to damage: a run that
    it stopped is resumed with `skip`.
    """
    sections = {name: getattr(config, name).model_dump(mode="json") for name in RESULT_SECTIONS}
    for key in ("source", "dir", "prepare", "cache_dir", "cache_bytes", "damage", "damage_budget_fraction"):
        sections["data"].pop(key)
    sections["data"]["mixture"] = list((config.data.mixture or {}).values())
    # How a step is computed changes rounding at most; of epochs and steps only the one in force counts.
    for key in ("kernels", "micro_batch_tokens", "activation_checkpointing"):
        sections["train"].pop(key)
    sections["train"].pop("steps" if config.train.steps is None else "epochs")
    # Where validation steers the run or chooses the weights, what is validated and when is part of the result.
    if config.evaluate.select == "best" or config.objective.aggressive or config.optimizer.schedule == "plateau":
        steering = ("select", "every_steps", "max_sequences")
        sections["evaluate"] = {key: getattr(config.evaluate, key) for key in steering}
    return sections


def _result_hash(config: Config, manifest_hash: str) -> str:
    text = canonical_json({"config": _result_config(config), "manifest": manifest_hash})
    return hashlib.sha256(text.encode()).hexdigest()


def _differences(there: dict[str, Any], plan: RunPlan) -> str:
    here = _flatten(_result_config(plan.config)) | {"the data set's manifest": plan.manifest_hash[:12]}
    before = _flatten(there["result_config"]) | {"the data set's manifest": there["manifest_hash"][:12]}
    names = [n for n in sorted(here.keys() | before.keys()) if here.get(n) != before.get(n)]
    return ", ".join(f"{n} was {before.get(n)!r} and is now {here.get(n)!r}" for n in names)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
