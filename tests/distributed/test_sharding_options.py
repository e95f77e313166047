"""Switches of DeepSpeed's sharding on two processes: each leaves the losses as they are, or is refused in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, TINY, free_port, rank_environment, records

from vae_dist.config.objective_schema import OptimizerConfig
from vae_dist.config.schema import ClusterConfig
from vae_dist.engine import zero
from vae_dist.errors import MachineError

COMMON = (*TINY, "train.steps=12", "run.log_every_steps=1", "evaluate.every_steps=6", "run.checkpoint_every_steps=6")
CASES = {
    "plain": ("cluster.zero_stage=1",),
    "overlap 1": ("cluster.zero_stage=1", "cluster.overlap_communication=true"),
    "overlap 2": ("cluster.zero_stage=2", "cluster.overlap_communication=true"),
    "overlap 3": ("cluster.zero_stage=3", "cluster.overlap_communication=true"),
    "offload 1": ("cluster.zero_stage=1", "cluster.offload_optimizer=true"),
    "offload 2": ("cluster.zero_stage=2", "cluster.offload_optimizer=true"),
    "offload 3": ("cluster.zero_stage=3", "cluster.offload_optimizer=true", "cluster.offload_parameters=true"),
    "parameters": ("cluster.zero_stage=3", "cluster.offload_parameters=true"),
    "hpz": ("cluster.zero_stage=3", "cluster.hpz_ranks=2"),
}


def run_on_two(data: Path, storage: Path, cases: dict[str, tuple[str, ...]]) -> list[tuple[int, str]]:
    """Train the cases on two processes, one case after the other; status and output of each process."""
    arguments = [str(data), str(storage), json.dumps({name: [*COMMON, *more] for name, more in cases.items()})]
    command, port = [sys.executable, str(ROOT / "tests/distributed/options_worker.py"), *arguments], free_port()
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **rank_environment(rank, 2, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def losses(run: Path) -> list[float]:
    return [record["elbo_per_seq"] for record in records(run, "train")]


@pytest.fixture(scope="module")
def storage(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, trained."""
    storage = tmp_path_factory.mktemp("sharding")
    done = run_on_two(dataset_dir, storage, {name.replace(" ", "-"): more for name, more in CASES.items()})
    assert all(status == 0 for status, _ in done), "\n".join(output for _, output in done)
    return storage


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name in CASES if name != "plain"])
def test_the_losses_are_those_of_the_plain_run(name: str, storage: Path) -> None:
    plain, found = losses(storage / "plain"), losses(storage / name.replace(" ", "-"))
    assert len(plain) == 12 and plain[-1] > plain[0] + 1.0, "it did not learn"
    assert found == pytest.approx(plain, rel=1e-4)


def test_deepspeed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal losses alone would not show that a switch arrived."""
    told: dict[str, Any] = {}

    def initialize(**arguments: Any) -> None:
        told.update(arguments["config"]["zero_optimization"])
        raise StopIteration

    monkeypatch.setattr(zero.deepspeed, "initialize", initialize)
    cluster = {"zero_stage": 3, "hpz_ranks": 2, "overlap_communication": True}
    cluster |= {"offload_optimizer": True, "offload_parameters": True}
    with pytest.raises(StopIteration):
        zero.build_engine(torch.nn.Linear(2, 2), OptimizerConfig(), ClusterConfig(**cluster), 8, 2)
    assert told["stage"] == 3 and told["zero_hpz_partition_size"] == 2 and told["overlap_comm"] is True
    assert told["offload_optimizer"]["device"] == told["offload_param"]["device"] == "cpu"
    with pytest.raises(StopIteration):
        zero.build_engine(torch.nn.Linear(2, 2), OptimizerConfig(), ClusterConfig(), 8, 2)
    assert told["stage"] == 0 and told["overlap_comm"] is False and told["zero_hpz_partition_size"] == 1


def test_quantised_communication_is_refused_without_gpus() -> None:
    for switch in ("quantized_weights", "quantized_gradients"):
        cluster = ClusterConfig(zero_stage=3, **{switch: True})
        with pytest.raises(MachineError, match="quantized_gradients need GPUs"):
            zero.build_engine(torch.nn.Linear(2, 2), OptimizerConfig(), cluster, 8, 2)
