"""The plateau: when validation counts as no better, when the learning rate is cut, when the run ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.config.objective_schema import PlateauConfig
from vae_dist.objective.plateau import Plateau


def make(**options: Any) -> Plateau:
    return Plateau(PlateauConfig(**{"patience": 2, "first_validation": 0, "max_reductions": 2, **options}))


def answers(plateau: Plateau, elbos: list[float]) -> list[str]:
    return [plateau.after_validation(elbo) for elbo in elbos]


def test_it_reduces_at_its_patience_and_counts_anew() -> None:
    plateau = make()
    assert answers(plateau, [-9.0, -8.0, -8.5]) == ["improved", "improved", "waiting"]
    assert plateau.factor == 1.0
    assert answers(plateau, [-8.2]) == ["reduce"]
    assert plateau.factor == 0.5
    assert answers(plateau, [-8.1, -8.1]) == ["waiting", "reduce"]
    assert plateau.factor == 0.25


def test_an_improvement_begins_the_count_anew_and_keeps_the_cut() -> None:
    plateau = make()
    assert answers(plateau, [-9.0, -9.5, -9.4, -8.0, -8.1]) == ["improved", "waiting", "reduce", "improved", "waiting"]
    assert plateau.factor == 0.5


def test_what_has_to_be_beaten_is_the_best_one_ever() -> None:
    assert answers(make(), [-8.0, -9.0, -9.0, -8.5]) == ["improved", "waiting", "reduce", "waiting"]


def test_an_equal_validation_is_no_improvement() -> None:
    assert answers(make(patience=1), [-8.0, -8.0]) == ["improved", "reduce"]


def test_the_plateau_after_the_last_reduction_stops_the_run() -> None:
    plateau = make(patience=1, max_reductions=2, factor=0.1)
    assert answers(plateau, [-8.0, -9.0, -9.0]) == ["improved", "reduce", "reduce"]
    assert plateau.factor == pytest.approx(0.01)
    assert not plateau.is_over
    assert answers(plateau, [-7.0, -9.0]) == ["improved", "stop"]
    # A run that is resumed after its stop must know that it is over.
    resumed = Plateau(PlateauConfig())
    resumed.load(plateau.state())
    assert plateau.is_over and resumed.is_over
    assert plateau.factor == pytest.approx(0.01)


def test_nothing_is_reduced_before_the_first_validation_that_may() -> None:
    """Numbered from 0: with 4, the fifth; those before it are counted."""
    plateau = make(first_validation=4)
    assert answers(plateau, [-8.0] + [-9.0] * 4) == ["improved", "waiting", "waiting", "waiting", "reduce"]
    plateau = make(first_validation=4)
    assert answers(plateau, [-8.0, -9.0, -9.0, -7.0, -9.0, -9.0])[3:] == ["improved", "waiting", "reduce"]


def test_the_published_recipe_halves_five_times_and_then_ends() -> None:
    plateau = Plateau(PlateauConfig())
    found = answers(plateau, [-100.0] + [-101.0] * 40)
    assert found.index("reduce") == 15
    assert found.count("reduce") == 5
    assert found.index("stop") == 15 + 2 * 5
    assert plateau.factor == 0.5**5


@given(st.lists(st.sampled_from([-9.0, -8.0, -7.0]), max_size=30), st.integers(0, 30), st.integers(1, 3))
def test_it_goes_on_from_its_state(elbos: list[float], cut: int, patience: int) -> None:
    whole, first, second = (make(patience=patience, max_reductions=50) for _ in range(3))
    taken = answers(first, elbos[:cut])
    second.load(json.loads(json.dumps(first.state())))
    assert taken + answers(second, elbos[cut:]) == answers(whole, elbos)
    assert (second.factor, second.state()) == (whole.factor, whole.state())
