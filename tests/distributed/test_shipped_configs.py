"""Every shipped configuration plans and takes steps, at a size that a test can afford."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT, train_in_one_process

from vae_dist.observe.metrics import read_metrics

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL_LSTM = ("model.encoder.hidden_dim=16", "model.decoder.hidden_dim=16")
SMALL_TRANSFORMER = tuple(
    f"model.{part}.{key}" for part in ("encoder", "decoder") for key in ("hidden_dim=32", "num_layers=2", "num_heads=2")
)
SMALLER = {
    "bilstm_coco": (*SMALL_LSTM, "optimizer.warmup_steps=2"),
    "gpus": (*SMALL_TRANSFORMER, "train.batch_sequences=64", "optimizer.warmup_steps=2"),
    "linear_wikitext": ("optimizer.warmup_steps=2",),
    "ptb": (*SMALL_LSTM, "optimizer.warmup_steps=2", "model.sampling_components=2"),
    "ptb_published": (*SMALL_LSTM, "optimizer.plateau={patience: 1, first_validation: 0}"),
    "transformer": (*SMALL_TRANSFORMER, "optimizer.warmup_steps=2"),
}


@pytest.fixture(scope="module")
def runs(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("shipped")
    common = ("train.steps=12", "run.log_every_steps=3", "evaluate.every_steps=6", "evaluate.max_sequences=64")
    cases = {path.stem: [str(path), *SMALLER[path.stem], *common] for path in CONFIGS}
    train_in_one_process(dataset_dir, storage, cases)
    return storage


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_a_shipped_configuration_learns_from_its_first_steps(runs: Path, name: str) -> None:
    # Per token: batches are alike in length, and differ in it.
    losses = [r["nll_per_token"] for r in read_metrics(runs / name) if r["kind"] == "train"]
    assert len(losses) == 4 and losses[-1] < losses[0]
