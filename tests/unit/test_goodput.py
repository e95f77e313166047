"""The goodput formula against a simulation of every device and its limits; the proposed interval against a search."""

from __future__ import annotations

import heapq
import math
import random

import pytest

from vae_dist.estimate.goodput import best_interval, goodput

DEVICES, HOUR = 4096, 3600.0


def simulate(interval: float, save: float, restart: float, device_mtbf: float, work: float, seed: int) -> float:
    """Share of the wall time that is work, in a run of `work` seconds on 4,096 devices.

    A discrete-event simulation: every device has its own next failure, and is replaced when it fails. What is done
    since the last checkpoint is lost, an unfinished checkpoint too; a restart begins again when a device fails in it.
    """
    chance = random.Random(seed)
    failures = [chance.expovariate(1.0 / device_mtbf) for _ in range(DEVICES)]
    heapq.heapify(failures)

    def next_failure(before: float) -> float | None:
        """The first failure before that time, its device replaced; None if all hold."""
        if failures[0] >= before:
            return None
        failed = failures[0]
        heapq.heapreplace(failures, failed + chance.expovariate(1.0 / device_mtbf))
        return failed

    now, segments = 0.0, math.ceil(work / interval)
    while segments:
        failed = next_failure(now + interval + save)
        if failed is None:
            now, segments = now + interval + save, segments - 1
            continue
        now = failed
        while (again := next_failure(now + restart)) is not None:
            now = again
        now += restart
    return math.ceil(work / interval) * interval / now


@pytest.mark.parametrize(
    ("interval", "save", "restart", "device_hours", "work_hours"),
    [
        # The default failure rate: one failure in 12 hours.
        (1800.0, 60.0, 120.0, 50_000.0, 60_000.0),
        # Failures every half hour, a slow restart: a third of the time is lost.
        (1200.0, 60.0, 300.0, 2_000.0, 3_000.0),
        # Restarts that often fail themselves.
        (600.0, 20.0, 600.0, 1_000.0, 600.0),
    ],
)
def test_the_formula_is_what_a_simulation_of_4096_devices_gives(
    interval: float, save: float, restart: float, device_hours: float, work_hours: float
) -> None:
    simulated = simulate(interval, save, restart, device_hours * HOUR, work_hours * HOUR, seed=1)
    expected = goodput(interval, save, restart, device_hours * HOUR / DEVICES)
    # The share that is lost is what is predicted, to the noise of a few thousand failures.
    assert 1.0 - expected == pytest.approx(1.0 - simulated, rel=0.04)


def test_without_failures_only_checkpoints_cost() -> None:
    assert goodput(600.0, 30.0, 120.0, math.inf) == pytest.approx(600.0 / 630.0)
    assert goodput(600.0, 30.0, 120.0, 1e12) == pytest.approx(600.0 / 630.0, rel=1e-6)


def test_small_losses_add_up() -> None:
    """To first order: save / interval, half an interval a failure, and a restart a failure."""
    interval, save, restart, mtbf = 1000.0, 1.0, 10.0, 1e6
    lost = save / interval + (interval / 2 + restart) / mtbf
    assert 1.0 - goodput(interval, save, restart, mtbf) == pytest.approx(lost, rel=2e-3)


def test_a_system_that_fails_sooner_than_it_saves_does_nothing() -> None:
    assert goodput(3600.0, 60.0, 60.0, 1.0) == 0.0
    assert goodput(3600.0, 60.0, 60.0, 300.0) < 1e-3


@pytest.mark.parametrize("save", [0.5, 20.0, 200.0])
@pytest.mark.parametrize("mtbf", [1800.0, 43_945.0, 1e6])
def test_the_proposed_interval_is_the_best_one(save: float, mtbf: float) -> None:
    tried = [save * 1.01**n for n in range(2000)]
    best = max(goodput(interval, save, 120.0, mtbf) for interval in tried)
    assert goodput(best_interval(save, mtbf), save, 120.0, mtbf) == pytest.approx(best, rel=1e-3)
    # Young's first-order interval is what it comes to where failures are rare.
    if save < mtbf / 10_000:
        assert best_interval(save, mtbf) == pytest.approx(math.sqrt(2 * save * mtbf), rel=0.01)


def test_no_interval_is_longer_than_what_a_system_lives() -> None:
    assert best_interval(save=500.0, mtbf=100.0) == 100.0
