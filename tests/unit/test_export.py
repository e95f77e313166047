"""Model directories and checkpoint directories: what is written comes back, and damage is never loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import flip, truncate

from vae_dist.config.model_schema import LstmConfig, ModelConfig, TransformerConfig
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.text.tokenizer import Tokenizer, build_tokenizer
from vae_dist.errors import ModelError
from vae_dist.export.model_dir import FILES, copy_model, find_model_dir, load_model, write_model
from vae_dist.model.vae import TextVAE

TOKENIZER = build_tokenizer(["a b c d e f g"], PrepareConfig(tokenizer="word", vocab_size=32))
PROVENANCE = {"run": "r", "steps": 3, "tokens_seen": 99}


def make_vae(**changes: Any) -> TextVAE:
    part = LstmConfig(hidden_dim=6)
    values = {"embedding_dim": 5, "latent_dim": 3, "encoder": part, "decoder": part}
    torch.manual_seed(1)
    return TextVAE(ModelConfig(**(values | changes)), TOKENIZER.vocab_size)


def write(path: Path, vae: TextVAE, tokenizer: Tokenizer = TOKENIZER) -> Path:
    write_model(path, vae.state_dict(), vae.config, tokenizer, 17, PROVENANCE)
    return path


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write(tmp_path / "model", make_vae())


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"tie_embeddings": False, "injection": "memory"},
        {"bidirectional": True, "dropout": 0.3},
        {"decoder": TransformerConfig(hidden_dim=8, num_layers=1, num_heads=2)},
    ],
    ids=["tied", "untied", "bidirectional", "transformer"],
)
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    vae = make_vae(**changes)
    loaded = load_model(write(tmp_path / "model", vae))
    there = loaded.vae.state_dict()
    assert there.keys() == vae.state_dict().keys()
    assert all(torch.equal(there[name], weight) for name, weight in vae.state_dict().items())
    assert loaded.vae.config == vae.config
    assert loaded.vae.training is False
    assert loaded.max_tokens == 17
    assert loaded.info["provenance"] == PROVENANCE
    assert loaded.tokenizer.sha256 == TOKENIZER.sha256
    if vae.config.tie_embeddings:
        assert loaded.vae._output_weight().data_ptr() == loaded.vae.embedding.weight.data_ptr()


def test_every_file_is_there_and_none_is_a_pickle(model_dir: Path) -> None:
    assert sorted(p.name for p in model_dir.iterdir()) == sorted(FILES)
    assert "3 latent dimensions" in (model_dir / "card.md").read_text(encoding="utf-8")
    json.loads((model_dir / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("latent", "there", "absent"),
    [
        ("none", "# Language model", "reconstruct"),
        ("token", "3 latent dimensions for each token", "each sequence"),
    ],
)
def test_the_card_says_what_the_model_is(tmp_path: Path, latent: str, there: str, absent: str) -> None:
    write(tmp_path / "model", make_vae(latent=latent, injection="embedding"))
    card = (tmp_path / "model" / "card.md").read_text(encoding="utf-8")
    assert there in card and absent not in card


def test_equal_weights_have_equal_names_and_others_do_not(tmp_path: Path) -> None:
    vae = make_vae()
    first, again = (load_model(write(tmp_path / name, vae)).weights_sha256 for name in "ab")
    vae.output_bias.data[0] += 1e-7
    assert first == again
    assert load_model(write(tmp_path / "c", vae)).weights_sha256 != first


def test_weights_that_are_views_are_written_whole(tmp_path: Path) -> None:
    vae = make_vae()
    weights = {name: w.t().contiguous().t() if w.dim() == 2 else w for name, w in vae.state_dict().items()}
    write_model(tmp_path / "model", weights, vae.config, TOKENIZER, 17, {})
    there = load_model(tmp_path / "model").vae.state_dict()
    assert all(torch.equal(there[name], weight) for name, weight in vae.state_dict().items())


def test_a_run_directory_stands_for_its_model(tmp_path: Path) -> None:
    write(tmp_path / "run" / "model", make_vae())
    assert find_model_dir(tmp_path / "run") == tmp_path / "run" / "model"
    assert load_model(str(tmp_path / "run")).path == tmp_path / "run" / "model"


def test_a_copy_is_a_model(model_dir: Path, tmp_path: Path) -> None:
    copy_model(model_dir, tmp_path / "copy")
    assert load_model(tmp_path / "copy").weights_sha256 == load_model(model_dir).weights_sha256


def change_info(path: Path, **changes: Any) -> None:
    info = json.loads((path / "config.json").read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in info.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept), encoding="utf-8")


def replace_weights(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights.pop("output_bias")
    save_file(weights, path / "model.safetensors")


DAMAGES = {
    "unfinished": (lambda p: (p / "config.json").unlink(), "is no model directory: it needs"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "is no model directory: it needs"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing or damaged"),
    "broken tokenizer": (lambda p: truncate(p / "tokenizer.json"), "tokenizer.json is missing or damaged"),
    "broken config": (lambda p: truncate(p / "config.json"), "not readable as a model description"),
    "config is a list": (lambda p: (p / "config.json").write_text("[1]"), "not readable as a model description"),
    "keys missing": (lambda p: change_info(p, model=None, vocab_size=None), "lacks model, vocab_size"),
    "another version": (lambda p: change_info(p, format_version=2), "format version 2; this vae_dist reads 1"),
    "unknown model key": (lambda p: change_info(p, model={"depth": 3}), "cannot be loaded"),
    "another vocabulary": (lambda p: change_info(p, vocab_size=9), "cannot be loaded: .*state_dict"),
    "truncated weights": (lambda p: truncate(p / "model.safetensors"), "model.safetensors is damaged"),
    "one bit": (lambda p: flip(p / "model.safetensors", -5), "model.safetensors is damaged"),
    "other weights": (replace_weights, "model.safetensors is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_a_clear_error(model_dir: Path, name: str) -> None:
    harm, message = DAMAGES[name]
    harm(model_dir)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(model_dir)
    assert str(model_dir) in caught.value.message
    assert "\n" not in caught.value.message


def test_another_tokenizer_is_refused(model_dir: Path) -> None:
    build_tokenizer(["x y"], PrepareConfig(tokenizer="word", vocab_size=32)).save(model_dir / "tokenizer.json")
    with pytest.raises(ModelError, match="not the tokenizer this model was trained with"):
        load_model(model_dir)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model directory .*nowhere\. Train one"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"is no model directory.*vae-dist export"):
        load_model(tmp_path)


def test_an_interrupted_rewrite_leaves_no_model(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        write(model_dir, make_vae())
    with pytest.raises(ModelError, match="is no model directory"):
        load_model(model_dir)
