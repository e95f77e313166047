"""Runs that start from checkpoints of `transformers`, under DeepSpeed: what they train is what they export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_data import some_rows, word_tokenizer, write_dataset
from support import records, train_in_one_process
from tiny_checkpoints import huggingface_model, their_tokenizer

from vae_dist.config.load import canonical_json
from vae_dist.config.model_schema import HuggingFaceConfig, ModelConfig
from vae_dist.engine.export_run import export_run
from vae_dist.export.model_dir import load_model
from vae_dist.model.huggingface_checkpoint import with_architectures


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_from_checkpoints_trains_and_exports_a_model_of_its_own(tmp_path: Path, stage: int) -> None:
    write_dataset(tmp_path / "data", {"train": some_rows(200, 0), "valid": some_rows(20, 1)}, word_tokenizer())
    places = {}
    for where, kind in (("encoder", "bert"), ("decoder", "qwen3")):
        places[where] = HuggingFaceConfig(checkpoint=str(tmp_path / where))
        huggingface_model(kind).save_pretrained(tmp_path / where)
        their_tokenizer(("[end]", *(f"w{i}" for i in range(30)))).save(str(tmp_path / where / "tokenizer.json"))
    model = with_architectures(ModelConfig(embedding_dim=16, latent_dim=4, **places))
    arguments = [f"model={canonical_json(model)}", f"cluster.zero_stage={stage}", "train.steps=6"]
    train_in_one_process(tmp_path / "data", tmp_path, {"run": [*arguments, "run.checkpoint_every_steps=3"]})
    messages = [record["message"] for record in records(tmp_path / "run", "event")]
    assert f"{tmp_path}/decoder/tokenizer.json: embeddings of 30 of 60 tokens (50.0%)" in messages
    export_run(tmp_path / "run", tmp_path / "model")
    trained = torch.load(tmp_path / "run" / "weights.pt", weights_only=True)
    exported = load_model(tmp_path / "model").vae.state_dict()
    assert {name.removeprefix("vae.") for name in trained} == exported.keys()
    for name, weight in exported.items():
        assert torch.equal(weight, trained[f"vae.{name}"].to(weight.dtype)), name
    start = huggingface_model("qwen3").base_model.state_dict()
    moved = [(exported[f"decoder.model.{n}"] - w).abs().max() for n, w in start.items() if n != "embed_tokens.weight"]
    # Six small steps away from the checkpoint, every weight of them.
    assert all(0 < float(change) < 0.1 for change in moved)
