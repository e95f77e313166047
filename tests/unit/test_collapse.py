"""Collapse is said when it is one, with a remedy that the run does not have yet."""

from __future__ import annotations

from typing import Any

import pytest

from vae_dist.config.load import load_config
from vae_dist.observe.collapse import collapse_warning

PLAIN = ["objective.free_bits=none"]
FLOORED = ["objective.free_bits=dimension", "objective.free_bits_nats=0.25"]


def warning(kl: float, information: float, weight: float, overrides: list[str]) -> str | None:
    validation: dict[str, Any] = {"kl_per_seq": kl, "mutual_information_nats": information, "active_units": 3}
    return collapse_warning(validation, weight, load_config(None, overrides))


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (PLAIN, "free_bits=dimension"),
        (FLOORED, "autoencoder_fraction=0.2"),
        ([*FLOORED, "objective.autoencoder_fraction=0.2", "objective.reset_decoder=true"], "word_dropout=0.2"),
        ([*PLAIN, "model.prior={kind: flow}"], "free_bits=sequence"),
        ([*PLAIN, "objective.rate_control={kind: mdr, nats: 3}"], "autoencoder_fraction=0.2"),
        ([*PLAIN, "model.posterior={kind: delta}", "objective.aggressive={}"], "word_dropout=0.2"),
        ([*FLOORED, "objective.aggressive={}", "model.word_dropout=0.3"], "raise objective.free_bits_nats above 0.25"),
    ],
)
def test_the_remedy_is_the_next_one(overrides: list[str], remedy: str) -> None:
    message = warning(0.02, 0.0, 1.0, overrides)
    assert message is not None and remedy in message and "KL 0.02 nats" in message
    # It goes with the rest of the configuration.
    changes = [
        word for word in message.replace(",", " ").split() if word.startswith(("objective.", "model.")) and "=" in word
    ]
    load_config(None, [*overrides, *changes])


def test_a_rate_without_information_is_a_collapse_too() -> None:
    assert warning(8.0, 0.1, 1.0, FLOORED) is not None


@pytest.mark.parametrize(("kl", "information", "weight"), [(8.0, 5.0, 1.0), (0.6, 0.6, 1.0), (0.0, 0.0, 0.2)])
def test_a_latent_in_use_or_a_kl_that_hardly_counts_is_none(kl: float, information: float, weight: float) -> None:
    assert warning(kl, information, weight, PLAIN) is None
