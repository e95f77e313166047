"""Other places for a run's numbers: Weights & Biases and MLflow, imported only where a run asks for them.

Project, server and key are those packages' own settings: WANDB_PROJECT, WANDB_API_KEY, MLFLOW_TRACKING_URI, ...
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from vae_dist.errors import ConfigError


class WandbSink:
    """A run of Weights & Biases, found again by the name of the run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._run = _module("wandb").init(id=run_dir.name, name=run_dir.name, dir=str(run_dir), resume="allow")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers by `<kind>/<name>`; steps that were sent before a restart are not taken twice."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MlflowSink:
    """A run of MLflow, found again by the id that it leaves in the run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._mlflow, path = _module("mlflow"), run_dir / "mlflow_run_id"
        known = path.read_text(encoding="utf-8") if path.exists() else None
        path.write_text(self._mlflow.start_run(run_id=known, run_name=run_dir.name).info.run_id, encoding="utf-8")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers by `<kind>/<name>`."""
        self._mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self._mlflow.end_run()


SINKS: dict[str, type[WandbSink] | type[MlflowSink]] = {"wandb": WandbSink, "mlflow": MlflowSink}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"run.sinks names {name}, which the workers' Python lacks. Run: pip install {name}, or leave it out."
        ) from None
