"""Training through Ray and DeepSpeed, as a user runs it: invariance, resume, signals, backends, bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import TINY, Finished, RayCluster, records, start_command, wait_for

STEPS = 50
LONG = 600


def run_name(**settings: Any) -> str:
    return "-".join(f"{k}{v}" for k, v in settings.items())


def losses(run: Path) -> list[float]:
    """ELBO of every step, from the run's metrics."""
    return [record["elbo_per_seq"] for record in records(run, "train")]


def beginning(run: Path) -> dict[str, Any]:
    """What the run said of its engine when it began."""
    return next(record for record in records(run, "event") if "zero_stage" in record)


def relative(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(storage: Path, dataset_dir: Path) -> list[str]:
    """Every step logged; the intervals are off the step of any kill."""
    return [
        *TINY,
        f"run.storage={storage}",
        f"data.dir={dataset_dir}",
        f"train.steps={STEPS}",
        "run.log_every_steps=1",
        "evaluate.every_steps=25",
        "run.checkpoint_every_steps=20",
        "cluster.workers=2",
        "cluster.zero_stage=1",
    ]


@pytest.fixture(scope="module")
def uninterrupted(train: Callable[..., Finished], settings: list[str], storage: Path) -> Path:
    """Two workers, ZeRO-1, start to end: what the other runs are compared with."""
    done = train(*settings, "run.name=uninterrupted")
    assert done.status == 0, done.err
    return storage / "uninterrupted"


def test_run_leaves_everything_a_user_needs(uninterrupted: Path) -> None:
    result = json.loads((uninterrupted / "result.json").read_text())
    assert result["steps"] == STEPS and result["valid"]["ppl"] > 1 and result["baselines"]["bigram_ppl"] > 1
    assert result["valid"]["elbo_per_seq"] == pytest.approx(
        -result["valid"]["rec_per_seq"] - result["valid"]["kl_per_seq"], rel=1e-9
    )
    assert len(losses(uninterrupted)) == STEPS
    assert losses(uninterrupted)[-1] > losses(uninterrupted)[0] + 5, "it did not learn"
    for name in ("resolved.yaml", "run.json", "report.html", "model/model.safetensors", "model/card.md", "tensorboard"):
        assert (uninterrupted / name).exists(), name
    pickles = [p for p in uninterrupted.rglob("*") if p.suffix in (".pt", ".pkl", ".bin", ".pth")]
    assert pickles == []


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_stage_changes_neither_losses_nor_model(
    stage: int, train: Callable[..., Finished], settings: list[str], uninterrupted: Path, storage: Path
) -> None:
    done = train(*settings, f"cluster.zero_stage={stage}", f"run.name=zero{stage}")
    assert done.status == 0, done.err
    assert relative(losses(storage / f"zero{stage}"), losses(uninterrupted)) < 1e-4
    event = beginning(storage / f"zero{stage}")
    whole, held = event["parameters"], event["optimizer_elements_per_rank"]
    expected_class = {0: "AdamW", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}[stage]
    assert event["optimizer"] == expected_class
    if stage == 0:
        assert held == [whole, whole]
    else:
        # Halves, up to the padding that makes partitions equal.
        assert all(abs(h - whole / 2) < 0.05 * whole for h in held), (held, whole)


def test_stage_one_partitions_the_optimizer(uninterrupted: Path) -> None:
    event = beginning(uninterrupted)
    assert event["optimizer"] == "DeepSpeedZeroOptimizer" and event["zero_stage"] == 1
    assert sum(event["optimizer_elements_per_rank"]) < 1.05 * event["parameters"]


def test_one_worker_gives_the_same_curve(
    train: Callable[..., Finished], settings: list[str], uninterrupted: Path, storage: Path
) -> None:
    done = train(*settings, "cluster.workers=1", "train.micro_batch_tokens=100", "run.name=one")
    assert done.status == 0, done.err
    assert relative(losses(storage / "one"), losses(uninterrupted)) < 1e-4
    ours = json.loads((storage / "one/result.json").read_text())["valid"]
    theirs = json.loads((uninterrupted / "result.json").read_text())["valid"]
    assert ours["elbo_per_seq"] == pytest.approx(theirs["elbo_per_seq"], rel=1e-4)


@pytest.mark.long
def test_triton_backend_gives_the_same_curve(
    train: Callable[..., Finished], settings: list[str], uninterrupted: Path, storage: Path
) -> None:
    """Three engine steps through the Triton interpreter."""
    done = train(
        *settings,
        "run.name=triton",
        "train.steps=3",
        "train.kernels=triton",
        "objective.annealing.fraction=0.0",
        environment={"TRITON_INTERPRET": "1"},
    )
    assert done.status == 0, done.err
    plain = train(*settings, "run.name=torch", "train.steps=3", "objective.annealing.fraction=0.0")
    assert plain.status == 0, plain.err
    assert relative(losses(storage / "triton"), losses(storage / "torch")) < 1e-5
    assert beginning(storage / "triton")["kernels"] == "triton" and beginning(storage / "torch")["kernels"] == "torch"


@pytest.mark.long
def test_triton_without_gpu_is_refused_and_not_replaced(train: Callable[..., Finished], settings: list[str]) -> None:
    done = train(*settings, "run.name=refused", "train.kernels=triton", environment={"TRITON_INTERPRET": "0"})
    assert done.status == 2 and "TRITON_INTERPRET=1" in done.err and "Traceback" not in done.err, done.err


@pytest.fixture(scope="module")
def long_settings(settings: list[str]) -> list[str]:
    """Steps take milliseconds: enough of them that a run is still going when it is killed."""
    return [*settings, f"train.steps={LONG}", "evaluate.every_steps=10000", "run.checkpoint_every_steps=20"]


@pytest.fixture(scope="module")
def long_run(train: Callable[..., Finished], long_settings: list[str], storage: Path) -> Path:
    done = train(*long_settings, "run.name=long")
    assert done.status == 0, done.err
    return storage / "long"


def test_killed_run_resumes_to_the_same_end(
    ray_cluster: RayCluster, train: Callable[..., Finished], long_settings: list[str], long_run: Path, storage: Path
) -> None:
    """SIGKILL to the driver after the first checkpoint; the same command goes on from a later one."""
    run = storage / "killed"
    command = [sys.executable, "-m", "vae_dist.train", *long_settings, "run.name=killed"]
    process = start_command(command, ray_cluster.environment)
    try:
        wait_for(lambda: len(losses(run)) >= 25, 120, "25 steps")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = train(*long_settings, "run.name=killed")
    assert done.status == 0, done.err
    resumed = [int(m.group(1)) for m in re.finditer(r"resuming from step (\d+)", done.err)]
    assert len(resumed) == 1 and 20 <= resumed[0] < LONG and resumed[0] % 20 == 0, done.err
    assert losses(run) == losses(long_run), "the same world size must give the same bits"
    ours, theirs = ((r / "model/model.safetensors").read_bytes() for r in (run, long_run))
    assert ours == theirs


@pytest.mark.long
def test_interrupt_saves_and_the_same_command_resumes(
    ray_cluster: RayCluster, train: Callable[..., Finished], long_settings: list[str], long_run: Path, storage: Path
) -> None:
    """Ctrl-C as a terminal sends it: to the driver, and to every process of the cluster it started itself."""
    run = storage / "interrupted"
    settings = [*long_settings, "run.name=interrupted", "run.checkpoint_every_steps=10000"]
    local = {**ray_cluster.environment, "RAY_ADDRESS": ""}
    process = start_command([sys.executable, "-m", "vae_dist.train", *settings], local)
    try:
        wait_for(lambda: len(losses(run)) >= 3, 120, "3 steps")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    last = json.loads(out.strip().splitlines()[-1])
    stopped = last["steps"]
    assert last["finished"] is False and stopped < LONG
    assert (run / f"checkpoints/step-{stopped:08d}/manifest.json").exists()
    # Resumed with one worker: another world size goes on in the same global order.
    done = train(*settings, "cluster.workers=1")
    assert done.status == 0, done.err
    assert f"resuming from step {stopped}" in done.err
    # The promise is for 50 steps; chaos multiplies rounding beyond.
    near = stopped + 50
    assert relative(losses(run)[:near], losses(long_run)[:near]) < 1e-4


def test_finished_run_says_so_and_prints_its_line_again(
    train: Callable[..., Finished], settings: list[str], uninterrupted: Path
) -> None:
    again = train(*settings, "run.name=uninterrupted", timeout=30)
    assert again.status == 0 and "is finished" in again.err
    assert again.json == json.loads((uninterrupted / "result.json").read_text())


@pytest.mark.long
def test_transformer_trains_under_zero_three(
    train: Callable[..., Finished], settings: list[str], storage: Path
) -> None:
    parts = [
        f"model.{side}={{kind: transformer, hidden_dim: 32, num_layers: 2, num_heads: 2}}"
        for side in ("encoder", "decoder")
    ]
    common = [*settings, *parts, "train.steps=20", "evaluate.every_steps=20"]
    for stage in (1, 3):
        done = train(
            *common,
            f"run.name=transformer{stage}",
            f"cluster.zero_stage={stage}",
            f"train.activation_checkpointing={'true' if stage == 3 else 'false'}",
        )
        assert done.status == 0, done.err
    assert relative(losses(storage / "transformer3"), losses(storage / "transformer1")) < 1e-4


@pytest.mark.long
def test_bf16_agrees_with_fp32(
    train: Callable[..., Finished], settings: list[str], uninterrupted: Path, storage: Path
) -> None:
    done = train(*settings, "run.name=bf16", "train.precision=bf16")
    assert done.status == 0, done.err
    ours, theirs = losses(storage / "bf16"), losses(uninterrupted)
    assert ours != theirs, "bf16 must be another arithmetic"
    assert relative(ours, theirs) < 0.01


def test_too_many_workers_is_one_clear_message(train: Callable[..., Finished], settings: list[str]) -> None:
    done = train(*settings, "run.name=many", "cluster.workers=8", timeout=60)
    assert done.status == 2 and "8 workers" in done.err and "room for 4" in done.err and "Traceback" not in done.err, (
        done.err
    )


def test_other_configuration_in_the_run_directory(
    train: Callable[..., Finished], settings: list[str], uninterrupted: Path
) -> None:
    done = train(*settings, "run.name=uninterrupted", "train.seed=7", timeout=60)
    assert done.status == 2 and "train.seed was 0 and is now 7" in done.err and "Traceback" not in done.err, done.err


@pytest.mark.long
def test_missing_compiler_is_named(train: Callable[..., Finished], settings: list[str], tmp_path: Path) -> None:
    """On a cluster of its own, whose PATH has everything but g++."""
    for folder in ("/bin", "/usr/bin", "/usr/sbin"):
        for tool in Path(folder).iterdir():
            if not tool.name.endswith("g++") and "g++-" not in tool.name and not (tmp_path / tool.name).is_symlink():
                (tmp_path / tool.name).symlink_to(tool)
    done = train(*settings, "run.name=nocompiler", environment={"PATH": str(tmp_path), "RAY_ADDRESS": ""}, timeout=120)
    assert done.status == 2 and "needs g++" in done.err and "Traceback" not in done.err, done.err
