"""The command line as a user meets it: one JSON line last, exit statuses, one clear message for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vae_dist.cli import main
from vae_dist.config.model_schema import LstmConfig, ModelConfig
from vae_dist.data.store.dataset import Dataset
from vae_dist.export.model_dir import write_model
from vae_dist.model.vae import TextVAE
from vae_dist.train import main as train


@pytest.fixture(scope="module")
def model_dir(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = Dataset.open(dataset_dir).tokenizer
    part = LstmConfig(hidden_dim=16)
    config = ModelConfig(embedding_dim=8, latent_dim=4, encoder=part, decoder=part)
    path = tmp_path_factory.mktemp("model") / "model"
    write_model(path, TextVAE(config, tokenizer.vocab_size).state_dict(), config, tokenizer, 16, {"run": "random"})
    return path


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(list(arguments)) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must end with exit status 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1 and "Traceback" not in captured.err
    return captured.err


def test_prepare_info_and_preview_agree(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(f"sentence number {i} of the file" for i in range(200)), encoding="utf-8")
    out = str(tmp_path / "data")
    made = result(capsys, "data", "prepare", str(text), out, "--tokenizer", "word", "--valid-fraction", "0.2")
    assert sum(s["sequences"] for s in made["splits"].values()) == 200
    assert 15 < made["splits"]["valid"]["sequences"] < 70
    assert result(capsys, "data", "info", out)["manifest_hash"] == made["manifest_hash"]
    texts = result(capsys, "data", "preview", out, "--num", "3")["texts"]
    assert len(texts) == 3 and all(t.startswith("sentence number") for t in texts)


def test_tokenizer_trained_alone_is_the_one_prepare_trains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(f"Sentence number {i % 7} of the File" for i in range(300)), encoding="utf-8")
    options = ["--tokenizer", "word", "--lowercase", "--vocab-size", "12"]
    alone = result(capsys, "tokenizer", "train", str(text), str(tmp_path / "tokenizer.json"), *options)
    made = result(capsys, "data", "prepare", str(text), str(tmp_path / "data"), *options)
    assert alone["sha256"] == made["tokenizer_sha256"]


def test_sample_reproduces_by_seed_and_rows_are_their_own(capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    many = result(capsys, "sample", str(model_dir), "--num", "4", "--seed", "3")["texts"]
    one = result(capsys, "sample", str(model_dir), "--num", "1", "--seed", "5")["texts"]
    assert many[2] == one[0] and len(set(many)) == 4


def test_evaluation_counts_every_sequence_and_token(
    capsys: pytest.CaptureFixture[str], model_dir: Path, dataset_dir: Path
) -> None:
    found = result(capsys, "eval", str(model_dir), str(dataset_dir), "--split", "valid", "--importance-samples", "3")
    split = Dataset.open(dataset_dir).split("valid")
    assert (found["sequences"], found["tokens"]) == (split.sequences, split.tokens)
    assert found["elbo_per_seq"] == pytest.approx(-found["rec_per_seq"] - found["kl_per_seq"])
    assert found["iw_nll_per_seq"] <= -found["elbo_per_seq"] + 0.05


def test_doctor_and_plan_measure_something(capsys: pytest.CaptureFixture[str], dataset_dir: Path) -> None:
    facts = result(capsys, "doctor")
    assert facts["versions"]["torch"].startswith("2.13.0") and facts["cpus"] >= 1
    plan = result(capsys, "plan", f"data.dir={dataset_dir}", "train.steps=7", "model.embedding_dim=16")
    assert plan["steps"] == 7 and plan["parameters"] > 1000


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sample", "MISSING"], "no model directory"),
        (["sample", "EMPTY"], "model.safetensors"),
        (["eval", "MODEL", "MISSING"], "no data set directory"),
        (["eval", "MODEL", "EMPTY"], "manifest.json"),
        (["eval", "MODEL", "DATA", "--split", "tset"], "tset"),
        (["data", "preview", "DATA", "--split", "dev"], "train, valid"),
        (["data", "prepare", "MISSING", "EMPTY/out"], "no source"),
        (["data", "prepare", "TEXT", "EMPTY/out", "--max-tokens", "1"], "max_tokens"),
        (["data", "prepare", "TEXT", "EMPTY/out", "--tokenizer", "EMPTY/none.json"], "none.json"),
        (["reconstruct", "MODEL", "   "], "no token"),
        (["export", "EMPTY", "EMPTY/out"], "no run directory"),
        (["serve", "MISSING"], "no model directory"),
    ],
)
def test_bad_input_is_one_message_and_status_two(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    model_dir: Path,
    dataset_dir: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "corpus.txt").write_text("one line of text\n" * 20)
    places = {
        "MISSING": tmp_path / "missing",
        "EMPTY": tmp_path / "empty",
        "TEXT": tmp_path / "corpus.txt",
        "MODEL": model_dir,
        "DATA": dataset_dir,
    }
    for name, path in places.items():
        arguments = [a.replace(name, str(path)) for a in arguments]
    assert named in refusal(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments", [["sample", "M", "--num", "0"], ["sample", "M", "--temperature", "nan"], ["smaple"]]
)
def test_bad_flags_are_refused_by_the_parser(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train.sed=1"], "Did you mean 'seed'?"),
        (["missing.yaml"], "no configuration file"),
        (["data.dir=/nowhere"], "no data set directory"),
        (["data.source=/nowhere.txt"], "no source"),
        (["train.batch_sequences=30"], "multiple of data.streams"),
        (["cluster.workers=3"], "cluster.workers=2"),
    ],
)
def test_training_refuses_bad_input_before_it_starts_anything(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train([*arguments, f"run.storage={tmp_path}"]) == 2
    errors = capsys.readouterr().err
    assert named in errors and "Traceback" not in errors


def test_model_of_another_tokenizer_is_refused(
    capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path
) -> None:
    text = tmp_path / "other.txt"
    text.write_text("\n".join(f"other words {i}" for i in range(100)), encoding="utf-8")
    result(capsys, "data", "prepare", str(text), str(tmp_path / "other"), "--tokenizer", "word")
    assert "another tokenizer" in refusal(capsys, "eval", str(model_dir), str(tmp_path / "other"))


def test_a_tokenizer_replaces_no_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("some words to learn\n" * 9, encoding="utf-8")
    before = text.read_bytes()
    for out, reason in (
        (str(text), "exists"),
        (str(tmp_path), "exists"),
        (str(text / "tokenizer.json"), "is no directory"),
        ("", "is no local file"),
        ("s3://bucket/tokenizer.json", "is no local file"),
    ):
        assert reason in refusal(capsys, "tokenizer", "train", str(text), out, "--tokenizer", "word")
    assert text.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


@pytest.mark.parametrize("name", ["", "s3://"])
def test_an_address_that_names_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    for command in (["data", "prepare", name, str(tmp_path / "out")], ["data", "info", name], ["data", "lint", name]):
        assert "names no file or directory" in refusal(capsys, *command)


def test_fractions_that_leave_nothing_are_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--valid-fraction", "0.5", "--test-fraction", "0.5"]
    message = refusal(capsys, "data", "prepare", str(tmp_path / "nowhere"), str(tmp_path / "out"), *flags)
    assert "valid_fraction + test_fraction = 1 leaves nothing to train on" in message


def test_mixtures_that_cannot_be_are_refused(
    capsys: pytest.CaptureFixture[str], dataset_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    text = tmp_path / "corpus.txt"
    text.write_text("".join(f"the old sailor {i}\n" for i in range(200)), encoding="utf-8")
    tokenizer = ["--tokenizer", str(dataset_dir / "tokenizer.json"), "--max-tokens", "16"]
    result(capsys, "data", "prepare", str(text), str(other), *tokenizer)
    for mixture, reason in (
        (f"{{{dataset_dir}: 1, {dataset_dir}/: 2}}", "twice"),
        (f"{{{dataset_dir}: 1.0e+300, {other}: 1.0e-300}}", "less than one sequence in a billion"),
        (f"{{{dataset_dir}: 0, {other}: 1}}", "greater than 0"),
        (f'{{"": 1, {other}: 1}}', "at least 1 character"),
    ):
        assert reason in refusal(capsys, "plan", f"data.mixture={mixture}")
    both = f"data.mixture={{{dataset_dir}: 1.5e+308, {other}: 1.5e+308}}"
    assert result(capsys, "plan", both)["steps"] > 0
    assert "two answers" in refusal(capsys, "plan", both, f"data.dir={other}")
