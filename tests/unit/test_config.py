"""Configuration: every mistake is named with its place and its remedy, all at once."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
from pydantic import ValidationError

from vae_dist.config.load import canonical_json, dump_yaml, load_config, validate_section
from vae_dist.config.model_schema import LstmConfig
from vae_dist.config.schema import Config, PrepareConfig
from vae_dist.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def mistakes(tmp_path: Path, text: str, *overrides: str) -> str:
    """The message for a YAML text with mistakes in it."""
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.message


def test_no_file_is_the_default() -> None:
    assert load_config() == Config()


def test_yaml_goes_over_defaults_and_overrides_over_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {latent_dim: 8, dropout: 0.1}\ntrain:\n  seed: 3\n", encoding="utf-8")
    config = load_config(path, ["model.latent_dim=9", "objective.beta=0.5"])
    assert (config.model.latent_dim, config.model.dropout, config.train.seed) == (9, 0.1, 3)
    assert config.objective.beta == 0.5
    assert config.optimizer == Config().optimizer


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.seed=7", lambda c: c.train.seed == 7),
        ("train.epochs=2", lambda c: c.train.epochs == 2.0),
        ("optimizer.learning_rate=3.0e-4", lambda c: c.optimizer.learning_rate == 3e-4),
        ("train.steps=null", lambda c: c.train.steps is None),
        ("train.steps=", lambda c: c.train.steps is None),
        ("model.bidirectional=true", lambda c: c.model.bidirectional is True),
        ("data.source=a=b.txt", lambda c: c.data.source == "a=b.txt"),
        ("run.name='12'", lambda c: c.run.name == "12"),
        ("model.encoder={kind: transformer, num_layers: 2}", lambda c: c.model.encoder.num_layers == 2),
        ("data.prepare.max_tokens=33", lambda c: c.data.prepare.max_tokens == 33),
    ],
)
def test_override_forms(override: str, read: types.FunctionType) -> None:
    assert read(load_config(None, [override]))


def test_later_overrides_win() -> None:
    assert load_config(None, ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize("override", ["train.seed", "=3", "train..seed=3", ".seed=3", "train.=3"])
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="not of the form"):
        load_config(None, [override])


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="'seed' is a value, not a section"):
        load_config(None, ["train.seed=1", "train.seed.deeper=2"])


def test_an_override_that_is_not_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'model.encoder=\{kind'"):
        load_config(None, ["model.encoder={kind"])


def test_an_unknown_key_gets_the_nearest_one_and_its_line(tmp_path: Path) -> None:
    message = mistakes(tmp_path, "# a comment\nmodel:\n  latent_dim: 8\n  latnt_dims: 9\n")
    assert "run.yaml:4" in message
    assert "'model.latnt_dims'" in message
    assert "Did you mean 'latent_dim'?" in message


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("modle: {}", "model"),
        ("model: {encoder: {kind: lstm, hiden_dim: 3}}", "hidden_dim"),
        ("model:\n  decoder: {kind: transformer, num_head: 3}", "num_heads"),
        ("data: {prepare: {max_token: 9}}", "max_tokens"),
        ("objective: {annealing: {kind: cyclical, cycle: 3}}", "cycles"),
        ("objective: {rate_control: {kind: mdr, nat: 3}}", "nats"),
        ("model: {posterior: {batch_norm: 0.5}}", "batch_norm_gamma"),
    ],
)
def test_nearest_keys_at_every_depth(tmp_path: Path, text: str, near: str) -> None:
    assert f"Did you mean {near!r}?" in mistakes(tmp_path, text)


def test_a_variant_left_out_is_an_lstm(tmp_path: Path) -> None:
    assert load_config(None, ["model.encoder={hidden_dim: 7}"]).model.encoder == LstmConfig(hidden_dim=7)
    assert "Did you mean 'hidden_dim'?" in mistakes(tmp_path, "model: {encoder: {hiden_dim: 3}}")


def test_a_key_of_the_other_variant_is_unknown_here(tmp_path: Path) -> None:
    message = mistakes(tmp_path, "model: {encoder: {kind: lstm, mlp_ratio: 2.0}}")
    assert "unknown key 'model.encoder.mlp_ratio'" in message
    assert "hidden_dim, kind, num_layers" in message


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    text = "train:\n  sed: 1\n  batch_sequences: none\nobjective: {beta: -1}\nmodel:\n  encoder: {kind: gru}\n"
    message = mistakes(tmp_path, text, "cluster.zero_stage=4")
    assert "5 problems" in message
    for part in ("run.yaml:2", "run.yaml:3", "run.yaml:4", "run.yaml:6", "override 'cluster.zero_stage=4'"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {seed: '3'}", ("train.seed = '3'", "integer")),
        ("train: {batch_sequences: 1.5}", ("train.batch_sequences = 1.5", "integer")),
        ("model: {tie_embeddings: 1}", ("model.tie_embeddings = 1", "boolean")),
        ("optimizer: {learning_rate: fast}", ("optimizer.learning_rate = 'fast'", "number")),
        (
            "model: {injection: prefix}",
            ("model.injection = 'prefix'", "'embedding', 'memory', 'both', 'layers' or 'cross_attention'"),
        ),
        ("model: {encoder: {kind: gru}}", ("model.encoder", "'gru'", "lstm, transformer, bag_of_words or huggingface")),
        ("model: 3", ("model = 3", "dictionary")),
        ("train: {seed: -1}", ("train.seed = -1", "greater than or equal to 0")),
        ("train: {seed: 4294967296}", ("train.seed = 4294967296", "less than 4294967296")),
        ("model: {prior: {kind: gaussian}}", ("model.prior", "standard, mixture, vamp or flow")),
        ("objective: {annealing: {kind: cosine}}", ("'cosine'", "linear, logistic, cyclical or zero_linear")),
        ("objective: {annealing: {fraction: 1.01}}", ("annealing.fraction = 1.01", "less than or equal to 1")),
        ("objective: {rate_control: {kind: mdr}}", ("objective.rate_control.nats", "field required")),
        ("objective: {rate_control: {kind: pid}}", ("'pid'", "capacity, control_vae or mdr")),
        ("optimizer: {plateau: {factor: 1.0}}", ("optimizer.plateau.factor = 1.0", "less than 1")),
        ("model: {dropout: 1.0}", ("model.dropout = 1.0", "less than 1")),
        ("cluster: {zero_stage: 4}", ("cluster.zero_stage = 4", "less than or equal to 3")),
    ],
)
def test_wrong_types_and_values_out_of_range(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    message = mistakes(tmp_path, text)
    assert "run.yaml:1" in message
    for part in parts:
        assert part in message


def test_keys_that_are_not_strings_are_refused(tmp_path: Path) -> None:
    assert "run.yaml:2" in mistakes(tmp_path, "train:\n  3: 4\n")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: [1,", "not readable as YAML"),
        ("train:\n\tseed: 1", "line 2"),
        ("- train", "must hold a mapping of sections"),
        ("just words", "not str"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, part: str) -> None:
    assert part in mistakes(tmp_path, text)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"train: \xff\xfe")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(tmp_path / "run.yaml")


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing here yet\n", encoding="utf-8")
    assert load_config(tmp_path / "run.yaml") == Config()


def test_a_missing_file_gets_the_near_name(tmp_path: Path) -> None:
    (tmp_path / "ptb.yaml").touch()
    with pytest.raises(ConfigError, match=r"no configuration file .*ptb.yml.*Did you mean .*ptb\.yaml\?"):
        load_config(tmp_path / "ptb.yml")
    with pytest.raises(ConfigError, match=r"no configuration file [^?]*$"):
        load_config(tmp_path / "nowhere" / "else.yaml")


# The clashes below do not lean on defaults.
def test_dump_yaml_round_trips(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            "model.encoder={kind: transformer, num_heads: 2}", "train.micro_batch_tokens=512", "run.name='007'",
            "optimizer.epsilon=1.0e-9", "data.source='ein Pfad/mit: Ä'", "train.epochs=0.1",
            "model.prior={kind: flow, layers: 6}", "objective.aggressive={}", "objective.free_bits=none",
            "objective.annealing={kind: zero_linear}", "objective.rate_control={kind: mdr, nats: 5}",
        ],
    )  # fmt: skip
    (tmp_path / "resolved.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert canonical_json(load_config(tmp_path / "resolved.yaml")) == canonical_json(config)


def test_a_configuration_is_frozen() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.train = config.train


def test_flags_are_validated_like_a_file() -> None:
    assert validate_section(PrepareConfig, {"max_tokens": 9}).max_tokens == 9
    with pytest.raises(ConfigError, match=r"2 problems") as caught:
        validate_section(PrepareConfig, {"max_tokens": 1, "too_long": "cut"})
    assert "max_tokens = 1" in caught.value.message
    assert "too_long = 'cut'" in caught.value.message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load_config(path) != Config()


def test_there_are_at_most_ten_shipped_configurations() -> None:
    assert len(CONFIGS) <= 10


@pytest.mark.parametrize(("text", "value"), [("5e-3", 0.005), ("1E-4", 0.0001), ("2.e-2", 0.02), ("0.01", 0.01)])
def test_scientific_notation_is_a_number(text: str, value: float) -> None:
    assert load_config(None, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == value


def test_infinity_and_paths_in_names_are_refused() -> None:
    for override in ("train.epochs=.inf", "objective.beta=.nan", "run.name=a/../../b", "run.storage=s3://bucket/runs"):
        with pytest.raises(ConfigError):
            load_config(None, [override])
