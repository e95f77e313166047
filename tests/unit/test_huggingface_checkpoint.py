"""Models that start from checkpoints of `transformers`: weights, embeddings, export, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    OUR_WORDS,
    THEIR_TOKENS,
    THEIR_VOCAB,
    TOKENIZER,
    VOCAB,
    WIDTH,
    both_ids,
    huggingface_model,
    make_batch,
    make_config,
    make_vae,
    part,
    their_tokenizer,
    transformers,
    write_checkpoints,
)

from vae_dist.config.load import load_config
from vae_dist.config.model_schema import HuggingFaceConfig, ModelConfig
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.text.special_ids import BOS_ID, EOS_ID
from vae_dist.data.text.tokenizer import build_tokenizer
from vae_dist.decode.engine import generate
from vae_dist.decode.request import Decoding
from vae_dist.errors import ConfigError, DataError, MachineError
from vae_dist.export.model_dir import load_model, write_model
from vae_dist.model.huggingface_checkpoint import start_from_checkpoints, with_architectures, without_checkpoints
from vae_dist.model.vae import TextVAE

RNG = torch.tensor([3, 5])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory)


@torch.no_grad()
def test_an_exported_model_needs_no_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "start"
    for name, kind in (("encoder", "bert"), ("decoder", "qwen3")):
        shutil.copytree(checkpoints[kind], folder / name)
    vae = make_vae(encoder=part(folder / "encoder"), decoder=part(folder / "decoder"))
    batch, z_BD = make_batch([5, 8, 2]), torch.randn(2, 5)
    before = vae(batch, RNG)
    written = generate(vae, z_BD, [1, 2], Decoding(max_tokens=12))
    write_model(tmp_path / "model", vae.state_dict(), without_checkpoints(vae.config), TOKENIZER, 17, {})
    shutil.rmtree(folder)
    assert str(folder) not in (tmp_path / "model" / "config.json").read_text(encoding="utf-8")
    loaded = load_model(tmp_path / "model").vae
    after = loaded(batch, RNG)
    for old, new in ((before.rec_KB, after.rec_KB), (before.mean_RD, after.mean_RD), (before.latent.z, after.latent.z)):
        assert torch.equal(old, new)
    assert generate(loaded, z_BD, [1, 2], Decoding(max_tokens=12)) == written


def test_a_run_exports_its_model_without_the_places_it_came_from(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from vae_dist.engine.checkpoint_files import Progress
    from vae_dist.engine.export_run import write_run_model

    vae = make_vae(encoder=part(checkpoints["bert"]), decoder=part(checkpoints["llama"]))
    weights = {f"vae.{name}": weight for name, weight in vae.state_dict().items()}
    dataset: Any = SimpleNamespace(tokenizer=TOKENIZER, split=lambda name: SimpleNamespace(max_tokens=11))
    write_run_model(tmp_path, weights, vae.config, dataset, "r", Progress(3, 99, {}))
    info = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for name, model_type in (("encoder", "bert"), ("decoder", "llama")):
        assert info["model"][name]["checkpoint"] is None
        assert info["model"][name]["architecture"]["model_type"] == model_type
        assert info["model"][name]["architecture"]["vocab_size"] == THEIR_VOCAB
    assert str(checkpoints["bert"].parent) not in json.dumps(info["model"])


def test_the_driver_fills_in_the_architecture_once(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoints["llama"].parent)
    config = make_config(decoder=part(Path(checkpoints["llama"].name)))
    facts = json.loads((checkpoints["llama"] / "config.json").read_text(encoding="utf-8"))
    dropped = {"architectures", "dtype", "transformers_version"}
    assert config.decoder.architecture == {name: v for name, v in facts.items() if name not in dropped}
    assert config.decoder.checkpoint == str(checkpoints["llama"])
    assert with_architectures(config) == config
    assert ModelConfig.model_validate(json.loads(config.model_dump_json())) == config


@torch.no_grad()
def test_tokens_that_both_vocabularies_have_get_the_checkpoints_embeddings(checkpoints: dict[str, Path]) -> None:
    torch.manual_seed(0)
    vae = TextVAE(make_config(decoder=part(checkpoints["qwen2"])), VOCAB)
    before_VE = vae.embedding.weight.clone()
    notes = start_from_checkpoints(vae, TOKENIZER)
    assert notes[0] == f"decoder: weights of {checkpoints['qwen2']}"
    assert notes[1] == f"{checkpoints['qwen2']}/tokenizer.json: embeddings of 6 of 7 tokens (85.7%)"
    theirs_VE = huggingface_model("qwen2").get_input_embeddings().weight
    # <unk> has the same name in both; <s> and </s> have the same work, which config.json tells.
    known = {BOS_ID: 0, EOS_ID: 0, 3: THEIR_TOKENS.index("<unk>")}
    known |= {4 + i: THEIR_TOKENS.index(word) for i, word in enumerate(OUR_WORDS) if word in THEIR_TOKENS}
    for row, other in known.items():
        assert torch.equal(vae.embedding.weight[row], theirs_VE[other]), row
    others = [row for row in range(VOCAB) if row not in known]
    assert others == [0, 4 + OUR_WORDS.index("harbour")]
    got_VE = vae.embedding.weight.double()
    torch.testing.assert_close(F.normalize(got_VE[others]), F.normalize(before_VE[others].double()))
    rms = [got_VE[rows].square().mean().sqrt() for rows in (others, list(known))]
    torch.testing.assert_close(rms[0], rms[1], atol=0, rtol=1e-6)


def test_a_token_without_a_row_in_the_checkpoint_is_not_counted(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["gpt2"], tmp_path / "gpt2")
    their_tokenizer((*THEIR_TOKENS, *(f"[unused {i}]" for i in range(THEIR_VOCAB)), "harbour")).save(
        str(folder / "tokenizer.json")
    )
    vae = TextVAE(make_config(decoder=part(folder)), VOCAB)
    assert start_from_checkpoints(vae, TOKENIZER)[1].endswith("embeddings of 6 of 7 tokens (85.7%)")


@torch.no_grad()
def test_byte_level_vocabularies_that_differ_in_their_special_tokens_share_all_pieces(tmp_path: Path) -> None:
    texts = ["the old sailor watched the boat"] * 5
    ours = build_tokenizer(texts, PrepareConfig(tokenizer="bpe", vocab_size=280))
    facts = json.loads(ours._bytes)
    # Theirs: one special token, at the end, as in GPT-2.
    facts["added_tokens"] = []
    facts["model"]["vocab"] = {t: i - 4 for t, i in facts["model"]["vocab"].items() if i >= 4}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(facts))
    theirs.add_special_tokens(["<|endoftext|>"])
    end = theirs.get_vocab_size() - 1
    model = huggingface_model("gpt2", vocab_size=end + 1, bos_token_id=end, eos_token_id=end)
    model.save_pretrained(tmp_path)
    theirs.save(str(tmp_path / "tokenizer.json"))
    vae = TextVAE(make_config(decoder=part(tmp_path), latent="none"), ours.vocab_size)
    (_, note) = start_from_checkpoints(vae, ours)
    assert note.endswith(f"embeddings of {end:,} of {end:,} tokens (100.0%)")
    rows_VE = model.get_input_embeddings().weight
    assert torch.equal(vae.embedding.weight[4:], rows_VE[:end])
    assert torch.equal(vae.embedding.weight[[BOS_ID, EOS_ID]], rows_VE[[end, end]])
    # The language model is theirs, word for word: text after its start, and its end.
    (ids,) = ours.encode_batch(["the boat watched"])
    logits = model(input_ids=torch.tensor([[end, *(int(i) - 4 for i in ids[:-1])]])).logits[0].double()
    expected = F.cross_entropy(logits, torch.tensor([*(int(i) - 4 for i in ids[:-1]), end]), reduction="none")
    inputs = torch.tensor([[BOS_ID, *ids[:-1]]])
    hidden = vae.decoder(vae.embedding(inputs), torch.zeros(1, 0), torch.tensor([len(ids)]))
    ours_logits = (vae.to_embedding(hidden) @ vae.embedding.weight.T + vae.output_bias)[0]
    # Our vocabulary has the end twice, and <pad> and <unk>, which theirs has not.
    ours_logits[:, [0, BOS_ID, 3]] = -torch.inf
    got = F.cross_entropy(ours_logits.double(), torch.tensor(ids), reduction="none")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_the_encoders_embeddings_serve_where_the_decoder_has_no_checkpoint(checkpoints: dict[str, Path]) -> None:
    vae = make_vae(encoder=part(checkpoints["bert"]), tie_embeddings=False)
    fresh = TextVAE(make_config(encoder=part(checkpoints["bert"]), tie_embeddings=False), VOCAB)
    theirs_VE = huggingface_model("bert").get_input_embeddings().weight
    row, other = 4 + OUR_WORDS.index("boat"), THEIR_TOKENS.index("boat")
    assert torch.equal(vae.embedding.weight[row], theirs_VE[other])
    # Another kind of decoder writes with its own softmax.
    torch.manual_seed(0)
    fresh = TextVAE(vae.config, VOCAB)
    assert torch.equal(vae.output_weight, fresh.output_weight)
    assert torch.equal(vae.to_embedding.weight, fresh.to_embedding.weight)
    both = make_vae(encoder=part(checkpoints["bert"]), decoder=part(checkpoints["gpt2"]))
    assert torch.equal(both.embedding.weight[row], huggingface_model("gpt2").get_input_embeddings().weight[other])


def test_without_a_tokenizer_the_embeddings_start_at_random(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["gpt2"], tmp_path / "gpt2")
    (folder / "tokenizer.json").unlink()
    torch.manual_seed(0)
    vae = TextVAE(make_config(decoder=part(folder)), VOCAB)
    before_VE, projection = vae.embedding.weight.clone(), vae.to_embedding.weight.clone()
    assert (
        start_from_checkpoints(vae, TOKENIZER)[1] == f"{folder} has no tokenizer.json: the embeddings start at random"
    )
    assert torch.equal(vae.embedding.weight, before_VE) and torch.equal(vae.to_embedding.weight, projection)


@torch.no_grad()
def test_a_checkpoint_of_the_layers_alone_has_all_there_is_to_read(tmp_path: Path) -> None:
    """As `LlamaModel` saves it: no head, other names, half precision."""
    model = huggingface_model("llama")
    model.base_model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    their_tokenizer().save(str(tmp_path / "tokenizer.json"))
    vae = make_vae(decoder=part(tmp_path), latent="none", tie_embeddings=False)
    ours_BT, theirs_BT = both_ids(2, 6)
    reference = transformers.LlamaModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = reference(input_ids=theirs_BT).last_hidden_state
    got = vae.decoder(vae.embedding(ours_BT), torch.zeros(2, 0), torch.tensor([6, 6]))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert vae.decoder.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert torch.equal(vae.output_weight[4], vae.embedding.weight[4])


def problem(error: type[Exception], config: ModelConfig) -> str:
    """What a configuration is refused with, on the driver or when its weights are read."""
    with pytest.raises(error) as caught:
        start_from_checkpoints(TextVAE(with_architectures(config), VOCAB), TOKENIZER)
    return caught.value.message  # type: ignore[attr-defined]


def plain_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**({"embedding_dim": WIDTH, "latent_dim": 5} | changes))


def test_what_is_no_checkpoint_is_refused_before_the_launch(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def refused(folder: Path | str) -> str:
        with pytest.raises(ConfigError) as caught:
            with_architectures(plain_config(decoder=part(Path(folder))))
        return caught.value.message

    message = refused("gpt2-medium")
    assert "model.decoder.checkpoint: there is no directory" in message and "nothing is downloaded" in message
    assert f"{tmp_path} has no config.json" in refused(tmp_path)
    shutil.copy(checkpoints["gpt2"] / "config.json", tmp_path)
    assert f"{tmp_path} has no weights" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    message = refused(tmp_path)
    assert "pytorch_model.bin" in message and "pickles" in message and "save_pretrained" in message
    shutil.copy(checkpoints["gpt2"] / "model.safetensors", tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    cases = {
        "{": "config.json is no JSON",
        "[]": "holds no settings of a model",
        json.dumps(facts | {"quantization_config": {"bits": 4}}): "is quantised",
        json.dumps(facts | {"model_type": "unheard-of"}): "no model of model_type = 'unheard-of', and code",
        json.dumps({name: v for name, v in facts.items() if name != "model_type"}): "model_type = None",
    }
    for text, expected in cases.items():
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        assert expected in refused(tmp_path)


def test_an_architecture_that_is_not_the_checkpoints_is_refused(checkpoints: dict[str, Path]) -> None:
    facts = make_config(decoder=part(checkpoints["llama"])).decoder.architecture
    wrong = HuggingFaceConfig(checkpoint=str(checkpoints["llama"]), architecture=facts | {"num_hidden_layers": 3})
    message = problem(ConfigError, plain_config(decoder=wrong))
    assert "differ in num_hidden_layers" in message and "Leave architecture out" in message


@pytest.mark.parametrize(
    ("where", "architecture", "parts"),
    [
        ("decoder", {"model_type": "llama", "hiden_size": 16}, ("llama has no hiden_size", "hidden_size, ")),
        ("decoder", {"model_type": "llama", "hidden_size": "wide"}, ("makes no llama: ", "Mend it")),
        ("decoder", {"model_type": "distilbert", "dim": 16, "n_heads": 2}, ("distilbert is no language model",)),
        ("encoder", {"model_type": "t5", "d_model": 16}, ("t5 is not one stack of layers over text",)),
        ("encoder", {"model_type": "vit", "hidden_size": 16, "num_attention_heads": 2}, ("takes no inputs_embeds",)),
        (
            "encoder",
            {"model_type": "bert", "hidden_size": 12, "num_attention_heads": 5},
            ("makes no bert: ", "(12) is not a multiple"),
        ),
        (
            "encoder",
            {"model_type": "bert", "hidden_size": 24, "num_attention_heads": 2},
            ("model.embedding_dim = 16", "model.encoder (bert) have 24", "Set model.embedding_dim=24", "must agree"),
        ),
    ],
)
def test_architectures_that_cannot_serve(where: str, architecture: dict[str, Any], parts: tuple[str, ...]) -> None:
    message = problem(ConfigError, plain_config(**{where: HuggingFaceConfig(architecture=architecture)}))
    for expected in parts:
        assert expected in message


def test_damaged_and_incomplete_checkpoints_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["qwen2"], tmp_path / "qwen2")
    config = plain_config(decoder=part(folder))
    weights = load_file(folder / "model.safetensors")
    lacking = {name: w for name, w in weights.items() if "layers.1.mlp" not in name}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 3 weights, model.layers.1.mlp.down_proj.weight among them" in problem(DataError, config)
    save_file(
        weights | {"model.norm.weight": torch.ones(WIDTH + 1)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    assert f"{folder} cannot be read" in problem(DataError, config)
    (folder / "model.safetensors").write_bytes((checkpoints["qwen2"] / "model.safetensors").read_bytes()[:-100])
    assert f"{folder} cannot be read" in problem(DataError, config)
    shutil.copy(checkpoints["qwen2"] / "model.safetensors", folder)
    their_tokenizer(("[end]", "zebra")).save(str(folder / "tokenizer.json"))
    message = problem(DataError, config)
    assert "has no token of the data set's tokenizer" in message and "data.prepare.tokenizer" in message
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "tokenizer.json is not a Hugging Face tokenizer file" in problem(DataError, config)


def test_without_the_package_the_message_says_how_to_install_it(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MachineError, match=r"needs the package transformers .*pip install 'vae_dist\[huggingface\]'"):
        with_architectures(plain_config(decoder=part(checkpoints["gpt2"])))
    # Without such a part nothing asks for it.
    with_architectures(plain_config())


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["model.decoder={kind: huggingface}"],
            ("model.decoder.kind = huggingface has neither", "checkpoint=DIRECTORY"),
        ),
        (
            ["model.encoder={kind: huggingface, checkpoint: there}", "model.embedding_vectors=glove.txt"],
            ("glove.txt and model.encoder.checkpoint = there", "model.embedding_vectors=null"),
        ),
        (
            ["model.decoder={kind: huggingface, checkpoint: there}", "model.injection=layers"],
            ("model.injection = layers does not go with model.decoder.kind = huggingface", "model.injection=both"),
        ),
        (
            ["model.decoder={kind: huggingface, checkpoint: there}", "model.injection=cross_attention"],
            ("model.injection = cross_attention does not go with model.decoder.kind = huggingface",),
        ),
        (
            ["model.decoder={kind: huggingface, checkpoint: there}", "model.latent=token"],
            ("model.latent = token does not go with model.injection = both", "model.injection=embedding"),
        ),
        (
            ["model.decoder={kind: huggingface, checkpoint: there}", "model.teacher_forcing=false"],
            ("model.teacher_forcing = false does not go with model.decoder.kind = huggingface",),
        ),
        (
            ["model.encoder={kind: huggingface, checkpoint: there}", "model.bidirectional=true"],
            ("model.bidirectional = true does not go with model.encoder.kind = huggingface",),
        ),
        (["model.encoder={kind: huggingface, hidden_dim: 3}"], ("unknown key 'model.encoder.hidden_dim'",)),
    ],
)
def test_settings_that_clash_are_refused(overrides: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    for expected in parts:
        assert expected in caught.value.message
