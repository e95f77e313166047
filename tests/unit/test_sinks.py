"""Sinks for a run's numbers, against stand-ins of their packages: what they are told, and that a run goes on there."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vae_dist.errors import ConfigError
from vae_dist.observe.metrics import MetricsWriter

VALUES = {"loss": 1.5, "kl_per_dim": [1.0], "is_final": True, "note": "text", "steps": 7}
NUMBERS = {"train/loss": 1.5, "train/steps": 7}


def write_twice(folder: Path, sink: str) -> None:
    """A run, and its continuation."""
    for step in (1, 2):
        writer = MetricsWriter(folder, step - 1, [sink])
        writer.write("train", step, VALUES)
        writer.write("event", step, {"message": "no numbers"})
        writer.close()


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda numbers, step: calls.append((step, numbers)), finish=lambda: calls.append("over"))
    wandb: Any = ModuleType("wandb")
    wandb.init = lambda **told: calls.append((told["id"], told["resume"])) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write_twice(tmp_path, "wandb")
    began = (tmp_path.name, "allow")
    assert calls == [began, (1, NUMBERS), "over", began, (2, NUMBERS), "over"]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def start_run(run_id: str | None, run_name: str) -> SimpleNamespace:
        calls.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    mlflow: Any = ModuleType("mlflow")
    mlflow.start_run, mlflow.end_run = start_run, lambda: calls.append("over")
    mlflow.log_metrics = lambda numbers, step: calls.append((step, numbers))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    write_twice(tmp_path, "mlflow")
    name = tmp_path.name
    assert calls == [(None, name), (1, NUMBERS), "over", ("abc", name), (2, NUMBERS), "over"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        MetricsWriter(tmp_path, 0, [name])
