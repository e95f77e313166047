"""Runs that follow their own measurements: turns of encoder and decoder, and resuming in the middle, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support import train_in_one_process

from vae_dist.engine.checkpoint_files import NamedState, States, read_progress

COMMON = (
    "model.embedding_dim=16",
    "model.encoder={kind: bag_of_words}",
    "model.decoder={hidden_dim: 24}",
    "model.latent_dim=4",
    "objective.free_bits=none",
    "optimizer.learning_rate=0.01",
    "optimizer.warmup_steps=5",
    "train.batch_sequences=32",
    "train.precision=fp32",
    "data.length_groups=8",
    "run.keep_checkpoints=50",
)
TURNS = (
    *COMMON,
    "objective.aggressive={max_encoder_steps: 3, check_steps: 3, max_fraction: 1.0}",
    "train.steps=12",
    "run.checkpoint_every_steps=1",
    "evaluate.every_steps=100",
)
STEPS, RESUMED_FROM = 60, 20
STEERED = {
    "rate": ("objective.rate_control={kind: mdr, nats: 2}", "optimizer.average_decay=0.9"),
    "aggressive": ("objective.aggressive={max_encoder_steps: 7, check_steps: 2}",),
    "phases": ("objective.autoencoder_fraction=0.5", "objective.reset_decoder=true", "optimizer.average_decay=0.9"),
    "plateau": (
        "optimizer.kind=sgd",
        "optimizer.learning_rate=1.0",
        "optimizer.schedule=plateau",
        "optimizer.plateau={patience: 1, first_validation: 0, max_reductions: 9}",
    ),
    "normalised": ("model.posterior.batch_norm_gamma=0.7", "evaluate.select=best"),
}


@pytest.fixture(scope="module")
def turns(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, NamedState]]:
    """The state after each step of an aggressive run."""
    storage = tmp_path_factory.mktemp("turns")
    train_in_one_process(dataset_dir, storage, {"turns": list(TURNS)})
    folders = sorted((storage / "turns" / "checkpoints").glob("step-*"))
    assert len(folders) == 12
    return [States(folder) for folder in folders]


def moved(before: NamedState, after: NamedState) -> bool:
    """Whether weight, moments or count of updates changed in a single bit."""
    pairs = [(before.weight, after.weight), *((before.slots[s], after.slots[s]) for s in before.slots)]
    return not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.long
def test_an_encoder_step_leaves_all_else_bit_unchanged_and_a_decoder_step_the_encoder(
    turns: list[dict[str, NamedState]],
) -> None:
    # Rounds of three encoder steps and one decoder step; checkpoint i is the state after step i.
    for step in range(1, 12):
        names = {name for name in turns[step] if moved(turns[step - 1][name], turns[step][name])}
        of_encoder = {name for name in turns[step] if name.startswith(("vae.encoder.", "vae.posterior."))}
        assert names == (of_encoder if step % 4 != 3 else turns[step].keys() - of_encoder), step
    updates = {name: float(state.slots["step"]) for name, state in turns[-1].items()}
    assert updates["vae.posterior.weight"] == 9.0 and updates["vae.decoder.lstm.weight_hh_l0"] == 3.0


@pytest.mark.long
def test_a_steered_run_resumes_bit_for_bit(dataset_dir: Path, tmp_path: Path) -> None:
    often = (f"train.steps={STEPS}", "run.checkpoint_every_steps=10", "evaluate.every_steps=5", "run.log_every_steps=5")
    cases = {name: [*COMMON, *overrides, *often] for name, overrides in STEERED.items()}
    train_in_one_process(dataset_dir, tmp_path / "whole", cases)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for name in cases:
        for folder in (tmp_path / "resumed" / name / "checkpoints").glob("step-*"):
            if read_progress(folder).step > RESUMED_FROM:
                shutil.rmtree(folder)
        (tmp_path / "resumed" / name / "weights.pt").unlink()
        best = tmp_path / "resumed" / name / "best"
        for folder in best.glob("step-*") if best.exists() else ():
            if read_progress(folder).step > RESUMED_FROM:
                shutil.rmtree(folder)
    train_in_one_process(dataset_dir, tmp_path / "resumed", cases)
    for name in cases:
        whole, resumed = (
            torch.load(tmp_path / place / name / "weights.pt", weights_only=True) for place in ("whole", "resumed")
        )
        assert whole.keys() == resumed.keys()
        for key, value in whole.items():
            assert torch.equal(value, resumed[key]), f"{name}: {key}"


@pytest.mark.long
def test_a_run_whose_best_weights_are_gone_fails_and_says_so(dataset_dir: Path, tmp_path: Path) -> None:
    cases = {"best": [*COMMON, "evaluate.select=best", "train.steps=20", "evaluate.every_steps=5"]}
    train_in_one_process(dataset_dir, tmp_path, cases)
    shutil.rmtree(tmp_path / "best" / "best")
    with pytest.raises(AssertionError, match="does not hold the weights of the best validation"):
        train_in_one_process(dataset_dir, tmp_path, cases)
