"""Controllers of the KL: their equations, and closed loops with a simulated model whose KL answers to its weight."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.config.objective_schema import CapacityControl, MdrControl, ObjectiveConfig, PidControl
from vae_dist.objective.rate_control import ControlVae, MinimumDesiredRate, rate_controller

Controller = ControlVae | MinimumDesiredRate


def kl_of_model(
    controller: Controller,
    steps: int,
    *,
    gain: float,
    at_one: float = 0.0,
    lag: float = 20.0,
    noise: float = 0.0,
    kl: float = 0.0,
) -> np.ndarray:
    """KL of each step of a model whose KL drifts towards at_one + gain (1 - weight), measured with noise."""
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(steps):
        kl += (max(0.0, at_one + gain * (1.0 - controller.weight(1.0))) - kl) / lag
        seen.append(max(0.0, kl + noise * rng.standard_normal()))
        controller.update(seen[-1])
    return np.array(seen)


def control_vae(beta: float = 1.0, **options: Any) -> ControlVae:
    return ControlVae(PidControl(**{"nats": 3.0, **options}), beta)


def mdr(**options: Any) -> MinimumDesiredRate:
    return MinimumDesiredRate(MdrControl(**{"nats": 3.0, **options}))


def test_control_vae_follows_its_equation() -> None:
    controller, seen = control_vae(kp=0.02, ki=0.003, beta_min=0.1), [9.0, 4.0, 3.0, 5.5]
    assert controller.weight(0.7) == 0.1
    for t in range(len(seen)):
        controller.update(seen[t])
        error = [3.0 - kl for kl in seen[: t + 1]]
        assert controller.weight(0.0) == pytest.approx(0.1 + 0.02 / (1 + math.exp(error[-1])) - 0.003 * sum(error))


@pytest.mark.parametrize("gain", [4.0, 10.0, 30.0])
@pytest.mark.parametrize("nats", [1.0, 3.0])
def test_control_vae_brings_the_kl_to_its_set_point(gain: float, nats: float) -> None:
    controller = control_vae(nats=nats, ki=0.001)
    seen = kl_of_model(controller, 8000, gain=gain, noise=0.2, kl=0.5)
    assert seen[-2000:].mean() == pytest.approx(nats, abs=0.02)
    assert controller.weight(1.0) == pytest.approx(1 - nats / gain, abs=0.02)


def test_the_published_gains_settle_on_the_set_point() -> None:
    seen = kl_of_model(control_vae(), 20_000, gain=10.0, noise=0.3, kl=8.0)
    assert seen[-5000:].mean() == pytest.approx(3.0, abs=0.05)


def test_a_set_point_out_of_reach_leaves_the_weight_at_its_bound() -> None:
    low, high = control_vae(beta_min=0.2), control_vae(beta=0.6)
    assert kl_of_model(low, 5000, gain=2.0)[-1] == pytest.approx(2.0 * 0.8)
    assert low.weight(1.0) == 0.2
    assert kl_of_model(high, 5000, gain=20.0)[-1] == pytest.approx(20.0 * 0.4)
    assert high.weight(1.0) == 0.6


@given(st.lists(st.floats(0, 1e4), max_size=40), st.floats(0, 0.4), st.floats(1e-4, 1.0), st.floats(1e-6, 1.0))
def test_the_weight_stays_within_its_bounds(seen: list[float], low: float, kp: float, ki: float) -> None:
    controller = control_vae(beta=0.5, beta_min=low, kp=kp, ki=ki)
    for kl in seen:
        controller.update(kl)
        assert low <= controller.weight(0.0) <= 0.5
        assert -kp - 1e-9 <= controller.state()["integral"] <= 0.5 - low + 1e-9


def steps_to_leave(update: Callable[[float], float], bound: float, kl: float) -> int:
    return next((step for step in range(100_000) if abs(update(kl) - bound) > 1e-3), 100_000)


def plain_sum(kp: float, ki: float) -> Callable[[float], float]:
    """The same controller that always integrates."""
    total = 0.0

    def update(kl: float) -> float:
        nonlocal total
        total -= ki * (3.0 - kl)
        return min(max(kp / (1 + math.exp(3.0 - kl)) + total, 0.0), 1.0)

    return update


@pytest.mark.parametrize(("saturating", "bound", "turning"), [(0.0, 0.0, 4.0), (6.0, 1.0, 2.0)])
def test_long_saturation_does_not_wind_up(saturating: float, bound: float, turning: float) -> None:
    """Ten thousand steps at a bound are left as fast as a few; a plain sum needs as many to come back."""
    controller, plain = control_vae(), plain_sum(0.01, 0.0001)

    def ours(kl: float) -> float:
        controller.update(kl)
        return controller.weight(1.0)

    for _ in range(10_000):
        ours(saturating), plain(saturating)
    assert ours(saturating) == plain(saturating) == bound
    assert steps_to_leave(ours, bound, turning) < 50
    assert steps_to_leave(plain, bound, turning) > 10_000


def test_a_sum_held_whenever_beta_was_out_of_bounds_can_stay_there_for_good() -> None:
    """Why the sum is held only against errors that push further out."""
    integral, wanted = 0.0, 0.0

    def held(kl: float) -> float:
        nonlocal integral, wanted
        integral -= 0.0001 * (3.0 - kl) if 0.0 <= wanted <= 1.0 else 0.0
        wanted = 0.01 / (1 + math.exp(3.0 - kl)) + integral
        return min(max(wanted, 0.0), 1.0)

    for _ in range(1000):
        held(600.0)
    assert steps_to_leave(held, 1.0, 1.0) == 100_000
    controller = control_vae()
    for _ in range(1000):
        controller.update(600.0)
    assert controller.weight(1.0) == 1.0
    controller.update(1.0)
    assert controller.weight(1.0) < 1.0


def test_a_kl_of_any_size_does_not_overflow() -> None:
    controller = control_vae(nats=1e4)
    for kl in (0.0, 1e6):
        controller.update(kl)
        assert 0.0 <= controller.weight(1.0) <= 1.0


def test_the_multiplier_is_torchs_rmsprop_on_the_lagrangian() -> None:
    controller, rng = mdr(learning_rate=0.05), np.random.default_rng(1)
    multiplier = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.RMSprop([multiplier], lr=0.05, maximize=True)
    for kl in [*rng.uniform(0, 4, 50), *rng.uniform(3, 9, 200)]:
        optimizer.zero_grad()
        (multiplier * (3.0 - kl)).backward()
        optimizer.step()
        multiplier.data.clamp_(min=0.0)
        controller.update(float(kl))
        assert controller.weight(0.8) == pytest.approx(0.8 - multiplier.item(), abs=1e-12)


@pytest.mark.parametrize("at_one", [0.0, 1.5])
@pytest.mark.parametrize("gain", [5.0, 20.0])
def test_mdr_draws_the_kl_up_to_its_rate(at_one: float, gain: float) -> None:
    controller = mdr()
    seen = kl_of_model(controller, 10_000, gain=gain, at_one=at_one, noise=0.2)
    assert seen[-5000:].mean() == pytest.approx(3.0, abs=0.06)
    assert seen[-5000:].std() < 1.0


def test_mdr_draws_up_a_kl_that_no_positive_weight_would() -> None:
    controller = mdr(nats=3.0)
    seen = kl_of_model(controller, 10_000, gain=2.0, noise=0.2)
    assert seen[-5000:].mean() == pytest.approx(3.0, abs=0.06)
    assert controller.weight(1.0) < 0.0


def test_mdr_does_nothing_where_the_kl_is_large_enough() -> None:
    controller = mdr()
    assert kl_of_model(controller, 2000, gain=10.0, at_one=5.0, kl=5.0)[-1] == pytest.approx(5.0)
    assert controller.weight(0.9) == 0.9


@pytest.mark.parametrize("make", [control_vae, mdr])
def test_a_controller_goes_on_bit_for_bit_from_its_state(make: Callable[[], Controller]) -> None:
    one, other, rng = make(), make(), np.random.default_rng(2)
    seen = rng.uniform(0, 9, 300).tolist()
    for kl in seen[:200]:
        one.update(kl)
    other.load(json.loads(json.dumps(one.state())))
    for kl in seen[200:]:
        assert one.weight(0.7) == other.weight(0.7)
        one.update(kl)
        other.update(kl)
    assert one.state() == other.state() != make().state()


def test_the_controller_is_the_configured_one() -> None:
    assert rate_controller(ObjectiveConfig()) is None
    assert rate_controller(ObjectiveConfig(rate_control=CapacityControl(nats=3.0))) is None
    assert isinstance(rate_controller(ObjectiveConfig(rate_control=MdrControl(nats=3.0))), MinimumDesiredRate)
    made = rate_controller(ObjectiveConfig(beta=0.3, rate_control=PidControl(nats=0.5)))
    assert isinstance(made, ControlVae)
    assert kl_of_model(made, 20_000, gain=10.0)[-1] == pytest.approx(7.0)
    assert made.weight(0.0) == 0.3
