"""The memory, the communication and the checkpoints that `vae-dist plan` predicts, against real DeepSpeed processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import ROOT, TINY, free_port, rank_environment, start_command, train_in_one_process

from vae_dist.config.load import load_config
from vae_dist.config.schema import Config
from vae_dist.data.store.dataset import Dataset
from vae_dist.estimate.forecast import model_sizes
from vae_dist.estimate.memory import ModelState, checkpoint_bytes, model_state
from vae_dist.estimate.timing import communication_bytes

pytestmark = pytest.mark.long

WORKERS = 2
COMMON = (
    *TINY,
    "data.prepare.max_tokens=16",
    "model.embedding_dim=192",
    "model.encoder={kind: lstm, hidden_dim: 256}",
    "model.decoder={kind: lstm, hidden_dim: 224}",
)
PART = "{kind: transformer, hidden_dim: 192, num_layers: 2}"
MODELS = {
    "lstm": [],
    "cut": ["train.micro_batch_tokens=48"],
    "transformer": [f"model.encoder={PART}", f"model.decoder={PART}"],
    "untied": ["model.tie_embeddings=false", "optimizer.kind=sgd"],
    "frozen": ["model.freeze_embeddings=true", "model.tie_embeddings=false"],
    "average": ["optimizer.average_decay=0.9"],
}
STAGES = {
    "lstm": range(4),
    "cut": (2, 3),
    "transformer": (1, 3),
    "untied": (0, 2, 3),
    "frozen": (2, 3),
    "average": (0,),
}
CASES = {f"{name}-{stage}": (name, stage) for name, stages in STAGES.items() for stage in stages}


def config_of(name: str, stage: int) -> Config:
    return load_config(None, [*COMMON, *MODELS[name], f"cluster.zero_stage={stage}"])


@pytest.fixture(scope="module")
def measured(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """What each rank held and sent, by case."""
    out, port = tmp_path_factory.mktemp("state"), free_port()
    cases = {c: [*COMMON, *MODELS[name], f"cluster.zero_stage={stage}"] for c, (name, stage) in CASES.items()}
    script = str(ROOT / "tests/distributed/state_bytes_worker.py")
    command = [sys.executable, script, str(dataset_dir), str(out), json.dumps(cases)]
    ranks = [start_command(command, rank_environment(rank, WORKERS, port)) for rank in range(WORKERS)]
    for process in ranks:
        output, errors = process.communicate(timeout=230)
        assert process.returncode == 0, f"{output}\n{errors}"
    return {case: [json.loads((out / f"{case}-{rank}.json").read_text()) for rank in range(WORKERS)] for case in cases}


def predicted(dataset_dir: Path, case: str) -> ModelState:
    config = config_of(*CASES[case])
    sizes = model_sizes(config, Dataset.open(dataset_dir).tokenizer.vocab_size)
    return model_state(sizes, config.optimizer, config.cluster.zero_stage, WORKERS)


@pytest.mark.parametrize("case", CASES)
def test_weights_gradients_and_optimizer_state_are_as_large_as_predicted(
    measured: dict[str, list[dict[str, float]]], dataset_dir: Path, case: str
) -> None:
    state = predicted(dataset_dir, case)
    held = max(rank["before update"] for rank in measured[case])
    assert state.total == pytest.approx(held, rel=0.02)
    if CASES[case][1] < 3:
        # ZeRO-3 keeps the memory of its gradients.
        after = max(rank["updated"] for rank in measured[case])
        assert state.total - state.gradients == pytest.approx(after, rel=0.02)
        assert state.gradients == pytest.approx(held - after, rel=0.05)


@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_what_is_predicted(
    measured: dict[str, list[dict[str, float]]], dataset_dir: Path, case: str
) -> None:
    config, ranks = config_of(*CASES[case]), measured[case]
    sizes = model_sizes(config, Dataset.open(dataset_dir).tokenizer.vocab_size)
    count = int(ranks[0]["micro-batches"])
    assert (count > 1) == case.startswith("cut")
    sent = communication_bytes(sizes, config.cluster.zero_stage, WORKERS, count)
    assert sent == pytest.approx(ranks[0]["sent"], rel=0.02)


@pytest.fixture(scope="module")
def checkpoints(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that left a checkpoint, by model."""
    storage = tmp_path_factory.mktemp("checkpoints")
    cases = {
        name: [*COMMON, *MODELS[name], "train.steps=2", "run.keep_checkpoints=1", f"run.name={name}"]
        for name in ("lstm", "untied", "average", "frozen")
    }
    train_in_one_process(dataset_dir, storage, cases)
    return storage


@pytest.mark.parametrize("name", ["lstm", "untied", "average", "frozen"])
def test_a_checkpoint_is_as_large_as_predicted(checkpoints: Path, dataset_dir: Path, name: str) -> None:
    config = config_of(name, 0)
    sizes = model_sizes(config, Dataset.open(dataset_dir).tokenizer.vocab_size)
    (directory,) = (checkpoints / name / "checkpoints").iterdir()
    written = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    assert checkpoint_bytes(sizes, config.optimizer) == pytest.approx(written, rel=0.02)
