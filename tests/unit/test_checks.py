"""Values that clash: each message names both and the change that mends them."""

from __future__ import annotations

import pytest

from vae_dist.config.checks import nearest_divisor, worker_problem
from vae_dist.config.load import load_config
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
        (["model.encoder={kind: transformer}", "model.bidirectional=true"], ("model.bidirectional", "LSTM")),
        (
            ["data.prepare.valid_fraction=0.5", "data.prepare.test_fraction=0.5"],
            ("valid_fraction + test_fraction = 1 ", "smaller than 1"),
        ),
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
