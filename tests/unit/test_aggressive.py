"""Aggressive training of the encoder: whose turn it is, for every way a round and the whole can end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.config.objective_schema import AggressiveConfig
from vae_dist.objective.aggressive import Aggressive


def make(most: int = 6, check: int = 2, fraction: float = 1.0, total: int = 1000) -> Aggressive:
    return Aggressive(AggressiveConfig(max_encoder_steps=most, check_steps=check, max_fraction=fraction), total)


def turns(machine: Aggressive, losses_per_token: Sequence[float], tokens: float = 10.0) -> str:
    """The turns taken while steps cost what is given, as the first letters of encoder, decoder and both."""
    taken = ""
    for loss in losses_per_token:
        taken += machine.turn[0]
        machine.after_step(loss * tokens, tokens)
    return taken


def nested_loops(losses: Sequence[float], tokens: Sequence[float], most: int, check: int) -> Iterator[str]:
    """The algorithm as two loops over the steps, the way it is published."""
    step = 0
    while step < len(losses):
        before, block, words, inner = float("inf"), 0.0, 0.0, 0
        while inner < most and step < len(losses):
            yield "e"
            block, words, inner, step = block + losses[step], words + tokens[step], inner + 1, step + 1
            if inner % check == 0:
                if block / words > before:
                    break
                before, block, words = block / words, 0.0, 0.0
        if step < len(losses):
            yield "d"
            step += 1


def test_a_round_ends_when_the_loss_of_a_block_rose() -> None:
    #            block 1   block 2   block 3: rose  decoder
    losses = [5.0, 4.0, 4.0, 3.0, 3.0, 4.5, 9.0]
    assert turns(make(most=100), losses) == "eeeeeed"
    assert turns(make(most=100), [5.0, 4.0, 4.0, 4.9, 4.0, 4.8]) == "eeeeee"


def test_a_round_ends_at_the_most_encoder_steps() -> None:
    falling = [10.0 - 0.1 * i for i in range(16)]
    assert turns(make(most=6), falling) == "eeeeeedeeeeeedee"
    assert turns(make(most=5), falling) == "eeeeedeeeeedeeee"
    assert turns(make(most=1, check=15), falling[:6]) == "ededed"


def test_an_equal_loss_is_no_rise() -> None:
    assert turns(make(most=8), [3.0] * 9) == "eeeeeeeed"


def test_the_first_block_of_a_round_has_nothing_to_rise_above() -> None:
    """The decoder's step and the round before do not count."""
    assert turns(make(most=4), [1.0, 1.0, 2.0, 2.0, 0.1, 9.0, 9.0, 8.0, 8.0]) == "eeeedeeee"


def test_a_block_is_weighted_by_its_tokens() -> None:
    machine = make(most=100)
    for loss, tokens in ((10.0, 10.0), (10.0, 10.0), (2.0, 1.0), (9.0, 10.0)):
        machine.after_step(loss, tokens)
    # 11 nats over 11 tokens equal 20 over 20; the mean of the ratios, 1.45, would be a rise.
    assert machine.turn == "encoder"


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 5))
def test_turns_are_those_of_the_nested_loops(seed: int, most: int, check: int) -> None:
    rng = np.random.default_rng(seed)
    losses, tokens = rng.uniform(1, 2, 80).tolist(), rng.integers(1, 4, 80).astype(float).tolist()
    machine, taken = make(most, check), ""
    for loss, words in zip(losses, tokens, strict=True):
        taken += machine.turn[0]
        machine.after_step(loss, words)
    assert taken == "".join(nested_loops(losses, tokens, most, check))


@given(st.integers(0, 2**32 - 1), st.integers(0, 79))
def test_it_goes_on_from_the_middle_of_anything(seed: int, cut: int) -> None:
    losses = np.random.default_rng(seed).uniform(1, 2, 80).tolist()
    whole, first = make(), make()
    whole.after_validation(2.0)
    first.after_validation(2.0)
    expected = turns(whole, losses)
    taken = turns(first, losses[:cut])
    second = make()
    second.load(json.loads(json.dumps(first.state())))
    assert taken + turns(second, losses[cut:]) == expected
    for machine in (whole, second):
        machine.after_validation(1.9)
        assert machine.turn == "both"


@pytest.mark.parametrize(
    ("information", "over"),
    [
        ([0.5], False),
        ([-0.1], False),
        ([0.5, 0.5], False),
        ([0.5, 0.7, 0.6], True),
        ([0.9, 0.8], True),
    ],
)
def test_it_ends_when_the_information_fell_below_that_of_the_validation_before(
    information: list[float], over: bool
) -> None:
    machine = make()
    for value in information:
        assert machine.turn == "encoder"
        machine.after_validation(value)
    assert (machine.turn == "both") == over


def test_once_over_it_stays_over() -> None:
    machine = make()
    machine.after_validation(1.0)
    machine.after_validation(0.5)
    machine.after_validation(2.0)
    assert turns(machine, [3.0, 2.0, 1.0]) == "bbb"
    machine.after_validation(3.0)
    assert machine.turn == "both"


def test_a_validation_within_a_round_leaves_the_round_alone() -> None:
    machine = make(most=3)
    assert turns(machine, [3.0]) == "e"
    machine.after_validation(1.0)
    assert turns(machine, [3.0, 3.0, 3.0, 3.0]) == "eede"
    machine.after_validation(1.1)
    assert turns(machine, [3.0, 3.0, 3.0]) == "eed"


def test_it_ends_at_its_share_of_the_run_at_the_latest() -> None:
    assert turns(make(most=2, fraction=0.5, total=10), [1.0] * 10) == "eedeebbbbb"
    assert turns(make(most=2, fraction=0.0, total=10), [1.0] * 3) == "bbb"
    assert turns(make(most=2, fraction=1.0, total=4), [1.0] * 5) == "eedeb"
