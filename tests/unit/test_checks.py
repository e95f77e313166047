"""Values that clash: each message names both and the change that mends them."""

from __future__ import annotations

import pytest

from vae_dist.config.checks import nearest_divisor, worker_problem
from vae_dist.config.load import load_config
from vae_dist.config.science_checks import CLASHES, cycle_problem
from vae_dist.errors import ConfigError

WORKING = ["data.streams=8", "train.batch_sequences=64", "data.prepare.max_tokens=128"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.batch_sequences=20"], ("data.streams = 8", "train.batch_sequences=16 or 24", "data.streams=10")),
        (["train.batch_sequences=4"], ("train.batch_sequences=8,", "data.streams=4")),
        (["cluster.workers=3"], ("3 workers", "cluster.workers=2", "multiple of 3")),
        (
            ["model.encoder={kind: transformer, hidden_dim: 36, num_heads: 4}"],
            ("model.encoder.hidden_dim = 36", "2 x num_heads = 8"),
        ),
        (
            ["model.decoder={kind: transformer, hidden_dim: 12, num_heads: 4}"],
            ("model.decoder.hidden_dim = 12", "2 x num_heads = 8"),
        ),
        (
            ["data.prepare.valid_fraction=0.5", "data.prepare.test_fraction=0.5"],
            ("valid_fraction + test_fraction = 1 ", "smaller than 1"),
        ),
        (["run.checkpoint_url=checkpoints"], ("'checkpoints' is no whole URL", "s3://bucket/folder")),
        (["run.checkpoint_url=file://checkpoints/x"], ("no whole URL", "file:///folder")),
        (["train.micro_batch_tokens=100"], ("micro_batch_tokens = 100", "max_tokens = 128")),
        (
            ["data.prepare.format=text", "data.prepare.record=document"],
            ("data.prepare.record = document", "record: line or paragraph or sentence, or format: wikitext"),
        ),
        (
            ["data.prepare.format=parquet", "data.prepare.record=sentence"],
            ("data.prepare.record = sentence", "record: line, or format: text or wikitext"),
        ),
    ],
)
def test_combinations_that_cannot_work(overrides: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*WORKING, *overrides])
    for part in parts:
        assert part in caught.value.message


def test_several_clashes_are_listed_at_once() -> None:
    with pytest.raises(ConfigError, match="3 problems"):
        load_config(None, [*WORKING, "train.batch_sequences=20", "cluster.workers=3", "train.micro_batch_tokens=1"])


def test_a_budget_is_not_held_against_options_that_a_given_data_set_does_not_use() -> None:
    config = load_config(None, [*WORKING, "data.dir=/some/where", "train.micro_batch_tokens=100"])
    assert config.train.micro_batch_tokens == 100


def test_nearest_divisor() -> None:
    assert [nearest_divisor(12, n) for n in (1, 5, 7, 9, 10, 100)] == [1, 4, 6, 6, 12, 12]
    assert nearest_divisor(8, 3) == 2
    assert nearest_divisor(7, 4) == 1


def test_a_worker_number_that_divides_is_no_problem() -> None:
    assert [worker_problem(n, 8) for n in (1, 2, 4, 8)] == [None] * 4
    assert worker_problem(16, 8) is not None


# What clashes with nothing, unless a row below says otherwise.
NEUTRAL = [*WORKING, "model.injection=embedding", "objective.free_bits=none", "objective.free_bits_nats=0.2"]
# Two settings that clash, and one that mends it.
CLASHING = [
    ("model.latent=none", "model.prior={kind: flow}", "model.prior={kind: standard}"),
    ("model.latent=none", "model.sampling_components=2", "model.sampling_components=0"),
    ("model.latent=none", "objective.rate_control={kind: mdr, nats: 3}", "objective.rate_control=null"),
    ("model.latent=none", "objective.entropy_weight=0.1", "objective.entropy_weight=0"),
    ("model.latent=none", "model.posterior={batch_norm_gamma: 0.5}", "model.posterior={kind: gaussian}"),
    ("model.latent=none", "objective.aggressive={}", "objective.aggressive=null"),
    ("model.latent=none", "model.posterior={kind: vmf}", "model.posterior={kind: gaussian}"),
    ("model.latent=none", "model.teacher_forcing=false", "model.teacher_forcing=true"),
    ("model.latent=none", "objective.autoencoder_fraction=0.1", "objective.autoencoder_fraction=0"),
    ("model.latent=none", "objective.importance_samples=2", "objective.importance_samples=1"),
    ("model.latent=token", "model.injection=both", "model.injection=embedding"),
    ("model.latent=token", "model.encoder={kind: bag_of_words}", "model.encoder={kind: lstm}"),
    ("model.latent=token", "model.prior={kind: vamp}", "model.prior={kind: mixture}"),
    ("model.latent=token", "objective.free_bits=batch_dimension", "objective.free_bits=batch_sequence"),
    ("model.latent=token", "model.sampling_components=2", "model.sampling_components=0"),
    ("model.posterior={kind: vmf}", "model.prior={kind: mixture}", "model.prior={kind: standard}"),
    ("model.posterior={kind: vmf}", "model.sampling_components=2", "model.sampling_components=0"),
    ("model.posterior={kind: vmf}", "objective.rate_control={kind: mdr, nats: 3}", "objective.rate_control=null"),
    ("model.posterior={kind: vmf}", "objective.entropy_weight=0.1", "objective.entropy_weight=0"),
    ("model.posterior={kind: vmf}", "objective.free_bits=dimension", "objective.free_bits=none"),
    ("model.posterior={kind: vmf}", "model.latent_dim=1", "model.latent_dim=2"),
    ("model.posterior={kind: delta}", "model.prior={kind: mixture}", "model.prior={kind: standard}"),
    ("model.posterior={kind: delta}", "objective.rate_control={kind: mdr, nats: 3}", "objective.rate_control=null"),
    ("model.posterior={kind: delta}", "objective.entropy_weight=0.1", "objective.entropy_weight=0"),
    ("model.posterior={kind: delta}", "objective.free_bits=sequence", "objective.free_bits=none"),
    ("train.micro_batch_tokens=500", "objective.free_bits=batch_dimension", "objective.free_bits=dimension"),
    ("train.micro_batch_tokens=500", "objective.free_bits=batch_sequence", "objective.free_bits=dimension"),
    ("train.micro_batch_tokens=500", "objective.rate_control={kind: capacity, nats: 3}", "objective.rate_control=null"),
    ("train.micro_batch_tokens=500", "model.posterior={batch_norm_gamma: 0.5}", "model.posterior={kind: gaussian}"),
    ("objective.importance_samples=2", "objective.free_bits=dimension", "objective.free_bits=none"),
    ("objective.importance_samples=2", "objective.rate_control={kind: mdr, nats: 3}", "objective.rate_control=null"),
    ("objective.rate_control={kind: capacity, nats: 3}", "objective.free_bits=dimension", "objective.free_bits=none"),
    ("objective.rate_control={kind: control_vae, nats: 3}", "objective.free_bits=sequence", "objective.free_bits=none"),
    (
        "objective.rate_control={kind: control_vae, nats: 3}", "objective.annealing={kind: cyclical}",
        "objective.annealing={kind: linear}",
    ),
    ("model.prior={kind: mixture}", "objective.free_bits=dimension", "objective.free_bits=sequence"),
    ("model.prior={kind: flow}", "objective.free_bits=batch_dimension", "objective.free_bits=sequence"),
    ("model.prior={kind: vamp}", "model.posterior={batch_norm_gamma: 0.5}", "model.prior={kind: mixture}"),
    ("model.prior={kind: flow}", "model.latent_dim=1", "model.latent_dim=2"),
    ("model.bidirectional=true", "model.encoder={kind: transformer}", "model.bidirectional=false"),
    ("model.bidirectional=true", "model.encoder={kind: bag_of_words}", "model.bidirectional=false"),
    ("model.injection=layers", "model.decoder={kind: lstm}", "model.decoder={kind: transformer}"),
    ("model.injection=cross_attention", "model.decoder={kind: bag_of_words}", "model.injection=both"),
    ("model.teacher_forcing=false", "model.decoder={kind: transformer}", "model.decoder={kind: lstm}"),
    ("model.teacher_forcing=false", "model.injection=memory", "model.injection=embedding"),
    ("model.teacher_forcing=false", "model.word_dropout=0.1", "model.word_dropout=0"),
    ("model.decoder={kind: bag_of_words}", "model.word_dropout=0.1", "model.word_dropout=0"),
    ("objective.reset_decoder=true", "objective.autoencoder_fraction=0", "objective.reset_decoder=false"),
    ("objective.aggressive={}", "objective.autoencoder_fraction=0.5", "objective.autoencoder_fraction=0"),
    ("objective.aggressive={}", "cluster.zero_stage=1", "cluster.zero_stage=0"),
    ("cluster.zero_stage=3", "model.encoder.recurrent_dropout=0.1", "model.encoder.recurrent_dropout=0"),
    ("cluster.zero_stage=3", "model.decoder.recurrent_dropout=0.1", "cluster.zero_stage=2"),
    ("cluster.zero_stage=3", "optimizer.average_decay=0.9", "optimizer.average_decay=0"),
    ("cluster.zero_stage=0", "cluster.overlap_communication=true", "cluster.zero_stage=1"),
    ("cluster.zero_stage=0", "cluster.offload_optimizer=true", "cluster.offload_optimizer=false"),
    ("cluster.zero_stage=2", "cluster.offload_parameters=true", "cluster.zero_stage=3"),
    ("cluster.zero_stage=1", "cluster.hpz_ranks=2", "cluster.hpz_ranks=1"),
    ("cluster.zero_stage=2", "cluster.quantized_weights=true", "cluster.quantized_weights=false"),
    ("cluster.zero_stage=2", "cluster.quantized_gradients=true", "cluster.zero_stage=3"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "mend"), CLASHING)
def test_two_settings_that_clash_are_both_named_and_the_advice_mends_it(first: str, second: str, mend: str) -> None:
    message = refused(first, second)
    assert "has a problem" in message
    for setting in (first, second):
        key, _, value = setting.partition("=")
        assert key in message
        # Of a section its kind is shown, or the key in it.
        assert value.strip("{}").split(", ")[0].split(": ")[-1] in message or value == "{}"
    assert mend in message
    load_config(None, [*NEUTRAL, first, second, mend])


def test_every_clash_of_the_table_is_provoked_here() -> None:
    messages = [refused(first, second) for first, second, _ in CLASHING]
    for clash in CLASHES:
        assert any(clash.first in m and clash.second in m and m.endswith(clash.remedy) for m in messages), clash


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*NEUTRAL, *overrides])
    return caught.value.message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["objective.annealing={kind: zero_linear, zero: 0.7, ramp: 0.5}"],
            ("zero = 0.7 and ramp = 0.5", "ramp of at most 0.3"),
        ),
        (["objective.annealing={kind: zero_linear, zero: 1.0, ramp: 0.0}"], ("zero = 1 ", "zero below 1")),
        (
            ["objective.annealing={kind: logistic, midpoint: 0.5, steepness: 5}"],
            ("steepness = 5 and midpoint = 0.5", "92% of beta", "at least 4.6"),
        ),
        (["objective.annealing={kind: logistic, midpoint: 1.0}"], ("steepness = 30 and midpoint = 1", "50% of beta")),
        (
            ["objective.rate_control={kind: control_vae, nats: 3, beta_min: 0.5}", "objective.beta=0.4"],
            ("beta_min = 0.5", "objective.beta = 0.4", "larger beta"),
        ),
        (
            ["objective.rate_control={kind: capacity, nats: 3}", "model.posterior={batch_norm_gamma: 0.5}"],
            ("nats = 3 is below 4,", "gamma = 0.5", "more nats"),
        ),
        (
            ["objective.importance_samples=5", "model.posterior={kind: vmf}"],
            ("dreg", "importance_samples = 5", "vmf", "objective.estimator=iwae"),
        ),
        (
            ["objective.importance_samples=5", "model.latent=token"],
            ("dreg", "importance_samples = 5", "model.latent = token", "objective.estimator=iwae"),
        ),
    ],
)
def test_settings_that_could_never_get_where_they_say(overrides: list[str], parts: tuple[str, ...]) -> None:
    message = refused(*overrides)
    assert "has a problem" in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.annealing={kind: zero_linear, zero: 0.7, ramp: 0.3}"],
        ["objective.annealing={kind: zero_linear, zero: 0.9, ramp: 0.1, cycles: 3}"],
        ["objective.annealing={kind: logistic, midpoint: 0.5, steepness: 9.2}"],
        ["objective.annealing={kind: cyclical, cycles: 1, ramp: 1.0}"],
        ["objective.annealing={kind: linear, fraction: 1.0, start: 2.0}"],
        ["objective.rate_control={kind: capacity, nats: 4}", "model.posterior={batch_norm_gamma: 0.5}"],
        ["objective.rate_control={kind: control_vae, nats: 3}", "objective.annealing={fraction: 0.4}"],
        ["objective.importance_samples=5", "model.posterior={kind: vmf}", "objective.estimator=iwae"],
        ["objective.importance_samples=5", "model.latent=token", "objective.estimator=iwae"],
        ["objective.importance_samples=5", "model.posterior={kind: delta}", "objective.autoencoder_fraction=0.2"],
        ["objective.autoencoder_fraction=0.3", "objective.reset_decoder=true", "cluster.zero_stage=3"],
        ["objective.aggressive={}", "optimizer.kind=sgd", "optimizer.schedule=plateau", "model.latent=token"],
        ["model.prior={kind: vamp}", "objective.free_bits=batch_sequence", "model.sampling_components=5"],
        ["train.micro_batch_tokens=500", "objective.free_bits=sequence", "objective.entropy_weight=0.1"],
        ["model.latent=none", "model.injection=both", "model.word_dropout=0.1", "objective.free_bits=batch_dimension"],
        [
            "model.latent=token",
            "model.teacher_forcing=false",
            "model.prior={kind: mixture}",
            "model.bidirectional=true",
        ],
        ["model.latent=none", "model.decoder={kind: bag_of_words}"],
        ["model.encoder={kind: bag_of_words}", "model.decoder={kind: transformer}", "model.injection=layers"],
        ["model.encoder={kind: transformer}", "model.decoder={kind: bag_of_words}", "model.injection=both"],
    ],
)
def test_combinations_that_work(overrides: list[str]) -> None:
    load_config(None, [*NEUTRAL, *overrides])


def test_free_bits_of_zero_nats_clash_with_nothing() -> None:
    overrides = ["objective.free_bits=dimension", "objective.free_bits_nats=0", "model.prior={kind: flow}"]
    assert load_config(None, [*NEUTRAL, *overrides]).objective.free_bits == "dimension"


def test_cycles_need_two_steps_each() -> None:
    config = load_config(None, [*NEUTRAL, "objective.annealing={kind: cyclical, cycles: 5}"])
    assert cycle_problem(config, 10) is None
    problem = cycle_problem(config, 9)
    assert problem is not None and "cycles = 5" in problem and "over 9" in problem and "at most 4 cycles" in problem
    after = load_config(
        None, [*NEUTRAL, "objective.annealing={kind: zero_linear, cycles: 5}", "objective.autoencoder_fraction=0.5"]
    )
    assert cycle_problem(after, 20) is None
    assert cycle_problem(after, 18) is not None
    assert cycle_problem(load_config(None, NEUTRAL), 1) is None
    assert cycle_problem(load_config(None, [*NEUTRAL, "objective.annealing={kind: cyclical, cycles: 1}"]), 1) is None
