"""Schedules at their corners: first and last step, and one step on either side of every break."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.config.objective_schema import (
    CapacityControl,
    CyclicalAnnealing,
    LinearAnnealing,
    LogisticAnnealing,
    ObjectiveConfig,
    OptimizerConfig,
    ZeroLinearAnnealing,
)
from vae_dist.objective.schedule import (
    Phase,
    beta_at,
    capacity_at,
    is_autoencoder,
    learning_rate_at,
    phase_at,
    phases,
)

PLAIN = ObjectiveConfig()
SHARES = st.floats(0, 1)
STEPS = st.integers(1, 300)


def linear(start: float, fraction: float, **objective: Any) -> ObjectiveConfig:
    return ObjectiveConfig(annealing=LinearAnnealing(start=start, fraction=fraction), **objective)


def cyclical(cycles: int, ramp: float, **objective: Any) -> ObjectiveConfig:
    return ObjectiveConfig(annealing=CyclicalAnnealing(cycles=cycles, ramp=ramp), **objective)


def zero_linear(cycles: int, zero: float, ramp: float, **objective: Any) -> ObjectiveConfig:
    return ObjectiveConfig(annealing=ZeroLinearAnnealing(cycles=cycles, zero=zero, ramp=ramp), **objective)


def betas(total: int, objective: ObjectiveConfig) -> list[float]:
    return [beta_at(step, total, objective) for step in range(total)]


def test_beta_at_every_corner() -> None:
    objective = linear(0.2, 0.3, beta=0.8)
    assert beta_at(0, 100, objective) == 0.2
    assert beta_at(1, 100, objective) == pytest.approx(0.2 + 0.6 / 30)
    assert beta_at(15, 100, objective) == pytest.approx(0.5)
    assert beta_at(29, 100, objective) == pytest.approx(0.8 - 0.6 / 30)
    assert beta_at(30, 100, objective) == pytest.approx(0.8)
    assert beta_at(99, 100, objective) == pytest.approx(0.8)


def test_beta_without_annealing_is_constant_from_the_first_step() -> None:
    assert set(betas(100, linear(0.0, 0.0, beta=0.5))) == {0.5}


def test_a_constant_beta_stays_constant() -> None:
    assert set(betas(10, linear(0.4, 1.0, beta=0.4))) == {0.4}


def test_beta_may_fall() -> None:
    assert betas(8, linear(1.0, 0.5, beta=0.0))[:6] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_a_ramp_over_the_whole_run_arrives_at_its_last_step() -> None:
    assert betas(5, linear(0.0, 1.0)) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert betas(5, cyclical(1, 1.0)) == betas(5, linear(0.0, 1.0))
    assert betas(2, linear(0.0, 1.0)) == [0.0, 1.0]
    assert betas(1, linear(0.0, 1.0)) == [1.0]


@given(STEPS, SHARES, st.floats(0, 3), st.floats(0, 3))
def test_beta_goes_one_way_and_arrives(total: int, fraction: float, start: float, end: float) -> None:
    objective = linear(start, fraction, beta=end)
    values = betas(total, objective)
    steps = np.diff(values) * (1 if end >= start else -1)
    assert (steps >= -1e-12).all()
    assert values[-1] == pytest.approx(end, abs=1e-12)
    assert beta_at(total, total, objective) == values[-1]
    if round(fraction * total) and total > 1:
        assert values[0] == start


def test_the_linear_ramp_is_the_one_of_bowmans_followers() -> None:
    """beta_t = min(1, b0 + (1 - b0) t / warm-up steps), as He et al. and Li et al. train with."""
    got = betas(1000, linear(0.1, 0.1))
    assert got == pytest.approx([min(1.0, 0.1 + 0.9 * t / 100) for t in range(1000)])


def test_logistic_annealing_at_its_middle_and_ends() -> None:
    objective = ObjectiveConfig(beta=0.6, annealing=LogisticAnnealing(midpoint=0.25, steepness=30.0))
    assert beta_at(25, 101, objective) == pytest.approx(0.3)
    assert beta_at(0, 101, objective) == pytest.approx(0.6 / (1 + math.exp(7.5)))
    assert beta_at(35, 101, objective) == pytest.approx(0.6 / (1 + math.exp(-3.0)))
    assert beta_at(100, 101, objective) == pytest.approx(0.6 / (1 + math.exp(-22.5)))
    assert beta_at(0, 1, objective) == beta_at(100, 101, objective)


def test_five_to_ninety_five_per_cent_of_the_default_logistic_take_a_fifth_of_the_run() -> None:
    values = np.array(betas(10_001, ObjectiveConfig(annealing=LogisticAnnealing())))
    assert ((values > 0.05) & (values < 0.95)).mean() == pytest.approx(2 * math.log(19) / 30, abs=1e-3)


@given(st.integers(2, 300), SHARES, st.floats(0.1, 1e6))
def test_logistic_annealing_rises_and_is_symmetric_about_its_middle(
    total: int, midpoint: float, steepness: float
) -> None:
    values = betas(total, ObjectiveConfig(annealing=LogisticAnnealing(midpoint=midpoint, steepness=steepness)))
    mirrored = betas(total, ObjectiveConfig(annealing=LogisticAnnealing(midpoint=1 - midpoint, steepness=steepness)))
    assert all(0.0 <= low <= high <= 1.0 for low, high in pairwise(values))
    # Absolute rounding of t - midpoint, times the slope of at most steepness / 4.
    assert values == pytest.approx([1 - v for v in mirrored[::-1]], abs=1e-15 * steepness + 1e-12)


def test_cycles_that_divide_the_run_are_fus() -> None:
    """beta = min(1, tau / R) with tau the share of the cycle that has passed (Fu et al. 2019, equations 6 and 7)."""
    got = betas(40, cyclical(4, 0.5, beta=0.7))
    assert got == pytest.approx([0.7 * min(1.0, (t % 10) / 10 / 0.5) for t in range(40)])
    # First and last step of a cycle, the step that first reaches beta, and the one before.
    assert (got[0], got[9], got[10]) == (0.0, 0.7, 0.0)
    assert (got[4], got[5]) == (pytest.approx(0.7 * 0.8), 0.7)


def test_cycles_that_do_not_divide_the_run_differ_by_a_step_and_all_arrive() -> None:
    got = betas(10, cyclical(4, 0.5))
    assert got == [0.0, 1.0, 0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.5, 1.0]
    starts = [step for step in range(1003) if beta_at(step, 1003, cyclical(4, 0.5)) == 0.0]
    assert starts == [0, 250, 501, 752] == [int(c * 1003 / 4) for c in range(4)]


def test_more_cycles_than_steps_leave_beta_at_its_peak() -> None:
    assert betas(3, cyclical(7, 0.5)) == [1.0, 1.0, 1.0]


@given(st.integers(2, 60), st.integers(1, 8), SHARES)
def test_cycles_repeat_and_each_is_a_linear_annealing(length: int, cycles: int, ramp: float) -> None:
    values = betas(length * cycles, cyclical(cycles, ramp))
    assert values == betas(length, linear(0.0, ramp)) * cycles


@given(STEPS, st.integers(1, 12), SHARES)
def test_every_cycle_ends_at_beta(total: int, cycles: int, ramp: float) -> None:
    objective = cyclical(cycles, ramp, beta=0.9)
    values = betas(total, objective)
    assert all(0.0 <= value <= 0.9 for value in values)
    ends = [(c + 1) * total // cycles - 1 for c in range(cycles)]
    assert all(values[end] == 0.9 for end in ends if end >= 0)
    falls = [step for step, (a, b) in enumerate(pairwise(values)) if b < a]
    assert set(falls) <= set(ends)


def test_zero_linear_at_every_corner() -> None:
    got = betas(40, zero_linear(2, 0.5, 0.25, beta=0.8))
    assert got[:20] == got[20:]
    assert got[:11] == [0.0] * 11
    assert got[11:15] == pytest.approx([0.16, 0.32, 0.48, 0.64])
    assert got[15:20] == [0.8] * 5


@given(STEPS, st.integers(1, 6), st.floats(0, 0.99), SHARES)
def test_zero_linear_waits_rises_and_arrives_in_every_cycle(total: int, cycles: int, zero: float, share: float) -> None:
    values = betas(total, zero_linear(cycles, zero, share * (1 - zero)))
    starts = sorted({c * total // cycles for c in range(cycles)})
    for start, end in pairwise([*starts, total]):
        cycle = values[start:end]
        assert all(low <= high for low, high in pairwise(cycle))
        assert cycle[-1] == 1.0
        assert cycle.count(0.0) >= min(round(zero * len(cycle)), len(cycle) - 1)


@given(STEPS, SHARES)
def test_zero_linear_without_its_zero_is_linear(total: int, ramp: float) -> None:
    assert betas(total, zero_linear(1, 0.0, ramp)) == betas(total, linear(0.0, ramp))


@given(st.integers(50, 300), st.floats(0.2, 1), st.sampled_from(["linear", "cyclical", "zero_linear"]))
def test_a_ramp_has_no_jump(total: int, ramp: float, kind: str) -> None:
    objective = {
        "linear": linear(0.0, ramp), "cyclical": cyclical(1, ramp), "zero_linear": zero_linear(1, 0.2, ramp * 0.8)
    }[kind]  # fmt: skip
    assert max(np.diff(betas(total, objective))) <= 1.0 / (0.8 * ramp * total - 2)


def test_a_run_without_autoencoder_is_one_phase() -> None:
    assert phases(10, PLAIN) == (Phase(0, 10, False),)
    assert not any(is_autoencoder(step, 10, PLAIN) for step in range(11))


def test_an_autoencoder_phase_comes_first_and_ends_where_it_says() -> None:
    objective = ObjectiveConfig(autoencoder_fraction=0.3)
    assert phases(10, objective) == (Phase(0, 3, True), Phase(3, 7, False))
    assert [is_autoencoder(step, 10, objective) for step in (0, 2, 3, 9, 10)] == [True, True, False, False, False]
    assert phase_at(3, 10, objective) == phase_at(10, 10, objective) == Phase(3, 7, False)


@given(STEPS, st.floats(0, 1, exclude_max=True))
def test_phases_cover_the_run_and_none_is_empty(total: int, fraction: float) -> None:
    found = phases(total, ObjectiveConfig(autoencoder_fraction=fraction))
    assert [step for p in found for step in range(p.first_step, p.first_step + p.steps)] == list(range(total))
    assert [p.autoencoder for p in found] == ([True, False] if fraction and total > 1 else [False])
    assert abs(sum(p.steps for p in found if p.autoencoder) - fraction * total) <= 1.0
    assert all(p.steps > 0 for p in found)


def test_annealing_and_capacity_begin_after_the_autoencoder() -> None:
    """Of 20 steps 8 train the autoencoder; the fractions are of the other 12."""
    objective = linear(0.1, 0.5, autoencoder_fraction=0.4, rate_control=CapacityControl(nats=6.0, ramp=0.25))
    assert betas(20, objective)[:9] == [0.0] * 8 + [0.1]
    assert beta_at(13, 20, objective) == pytest.approx(0.1 + 0.9 * 5 / 6)
    assert beta_at(14, 20, objective) == 1.0
    capacities = [capacity_at(step, 20, objective) for step in range(20)]
    assert capacities == pytest.approx([0.0] * 9 + [2.0, 4.0] + [6.0] * 9)


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 4), SHARES)
def test_after_an_autoencoder_phase_the_rest_is_a_run_of_its_own(first: int, rest: int, cycles: int, r: float) -> None:
    total = first + rest
    for alone in (linear(0.2, r), cyclical(cycles, r), ObjectiveConfig(annealing=LogisticAnnealing(midpoint=r))):
        after = alone.model_copy(update={"autoencoder_fraction": first / total})
        assert phases(total, after)[1] == Phase(first, rest, False)
        assert betas(total, after) == [0.0] * first + betas(rest, alone)


def test_capacity_at_every_corner() -> None:
    objective = ObjectiveConfig(rate_control=CapacityControl(nats=5.0, ramp=0.25))
    values = [capacity_at(step, 40, objective) for step in range(40)]
    assert (values[0], values[1], values[9], values[10], values[39]) == pytest.approx((0.0, 0.5, 4.5, 5.0, 5.0))
    at_once = ObjectiveConfig(rate_control=CapacityControl(nats=5.0, ramp=0.0))
    assert {capacity_at(step, 40, at_once) for step in range(40)} == {5.0}
    to_the_end = ObjectiveConfig(rate_control=CapacityControl(nats=4.0, ramp=1.0))
    assert [capacity_at(step, 5, to_the_end) for step in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_learning_rate_at_every_corner() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, min_learning_rate_ratio=0.1)
    got = {step: learning_rate_at(step, 101, config, PLAIN) for step in (0, 8, 9, 10, 55, 100, 500)}
    assert got == pytest.approx({0: 0.2, 8: 1.8, 9: 2.0, 10: 2.0, 55: 2.0 * (0.1 + 0.9 * 0.5), 100: 0.2, 500: 0.2})


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, min_learning_rate_ratio=0.0)
    got = [learning_rate_at(step, 5, config, PLAIN) for step in range(5)]
    assert got == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0])


def test_a_run_shorter_than_its_warmup_never_reaches_the_peak() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    assert [learning_rate_at(step, 3, config, PLAIN) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert learning_rate_at(0, 1, OptimizerConfig(learning_rate=1.0, warmup_steps=0), PLAIN) == 1.0


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_a_constant_learning_rate_warms_up_and_stays(schedule: str) -> None:
    config = OptimizerConfig.model_validate({"learning_rate": 3.0, "warmup_steps": 3, "schedule": schedule})
    got = [learning_rate_at(step, 9, config, PLAIN) for step in range(9)]
    assert got == pytest.approx([1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0])


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_begins_anew_with_each_phase(schedule: str) -> None:
    config = OptimizerConfig.model_validate({"learning_rate": 1.0, "warmup_steps": 4, "schedule": schedule})
    objective = ObjectiveConfig(autoencoder_fraction=0.4)
    got = [learning_rate_at(step, 50, config, objective) for step in range(50)]
    alone = [[learning_rate_at(step, steps, config, PLAIN) for step in range(steps)] for steps in (20, 30)]
    assert got == alone[0] + alone[1]
    assert (got[19], got[20]) == (pytest.approx(0.05) if schedule == "cosine" else 1.0, 0.25)


@given(st.integers(2, 200), st.integers(0, 50), SHARES)
def test_the_cosine_falls_from_the_peak_to_its_floor(total: int, warmup: int, floor: float) -> None:
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=warmup, min_learning_rate_ratio=floor)
    values = [learning_rate_at(step, total, config, PLAIN) for step in range(total)]
    assert all(a <= b for a, b in pairwise(values[: warmup + 1]))
    assert all(a >= b for a, b in pairwise(values[warmup:]))
    assert max(values) <= 0.5
    if total > warmup + 1:
        assert values[warmup] == 0.5
        assert values[-1] == pytest.approx(0.5 * floor, abs=1e-15)
