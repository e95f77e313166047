"""A model directory from a run: the one it finished with, or one made of its newest checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vae_dist.config.credentials import without_hidden
from vae_dist.config.load import load_config
from vae_dist.config.model_schema import ModelConfig
from vae_dist.data.store.dataset import Dataset
from vae_dist.engine.checkpoint_files import Progress, States, read_progress
from vae_dist.engine.checkpoint_store import newest_whole, open_store
from vae_dist.errors import ModelError
from vae_dist.export.model_dir import copy_model, find_model_dir, load_model, write_model
from vae_dist.model.huggingface_checkpoint import without_checkpoints

# DeepSpeed wraps the objective, which holds the model under this name.
_OBJECTIVE_PREFIX = "vae."


def export_run(run: Path, out: Path) -> dict[str, Any]:
    """Write a model directory to `out`.

    Raises:
        ModelError: `run` is no run directory, has no whole checkpoint, or `out` is not empty.
    """
    if not (run / "run.json").is_file():
        raise ModelError(f"{run} is no run directory: it has no run.json. A run directory lies under run.storage.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is there already and not empty. Choose another directory.")
    if (run / "result.json").is_file():
        copy_model(find_model_dir(run), out)
    else:
        _export_checkpoint(run, out)
    loaded = load_model(out)
    return {"model": str(out), "weights_sha256": loaded.weights_sha256, **loaded.info["provenance"]}


def _export_checkpoint(run: Path, out: Path) -> None:
    config = load_config(run / "resolved.yaml")
    identity = json.loads((run / "run.json").read_text(encoding="utf-8"))
    dataset = Dataset.open(without_hidden(identity["data_dir"]))
    url = config.run.checkpoint_url and without_hidden(config.run.checkpoint_url)
    store = open_store(config.run.model_copy(update={"checkpoint_url": url}), run, identity["result_hash"])
    checkpoint = newest_whole(store, run / "checkpoints")
    if checkpoint is None:
        raise ModelError(f"{run} has no whole checkpoint to export. Let it run longer.")
    try:
        weights = {name: state.slots.get("average", state.weight) for name, state in States(checkpoint).items()}
        write_run_model(out, weights, config.model, dataset, run.name, read_progress(checkpoint))
    finally:
        store.release(checkpoint)


def write_run_model(
    out: Path, weights: dict[str, torch.Tensor], model: ModelConfig, dataset: Dataset, run: str, progress: Progress
) -> None:
    """Write a model directory from the engine's named weights; a sampling prior not fitted yet is left out."""
    unfitted = [name for name, weight in weights.items() if "sampling_prior." in name and weight.isnan().any()]
    if unfitted:
        model = model.model_copy(update={"sampling_components": 0})
        weights = {name: weight for name, weight in weights.items() if "sampling_prior." not in name}
    write_model(
        out,
        {name.removeprefix(_OBJECTIVE_PREFIX): weight for name, weight in weights.items()},
        # The weights hold the vectors and checkpoints; where they came from is a place of one machine.
        without_checkpoints(model).model_copy(update={"embedding_vectors": None}),
        dataset.tokenizer,
        dataset.split("train").max_tokens,
        {"run": run, "steps": progress.step, "tokens_seen": progress.tokens_seen},
    )
