"""The parts of the wall time: what each second counts as, over interruptions, against a clock that the test turns."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vae_dist.observe.activity import Activity
from vae_dist.observe.wall_time import FILE, PARTS, WallTime


class Clock:
    """Seconds since some epoch, moved by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def at_step(folder: Path, step: int) -> Activity:
    """An activity that has come so far."""
    activity = Activity(folder, 0, torch.device("cpu"))
    activity.step = step
    return activity


def run_steps(wall: WallTime, clock: Clock, count: int, wait: float, step: float) -> None:
    """Steps that wait for data and then compute."""

    def batches() -> Iterator[int]:
        for number in range(count):
            clock.now += wait
            yield number

    for _ in wall.waiting_for(batches()):
        clock.now += step
        wall.activity.step += 1


def killed(wall: WallTime) -> None:
    """As its thread leaves the file when the process is gone."""
    wall.close(stopped_on_request=False)


def parts_of(wall: WallTime) -> dict[str, float]:
    values = wall.values()
    assert values["wall_seconds"] == pytest.approx(sum(values[f"wall_{part}_seconds"] for part in PARTS), rel=1e-12)
    return {part: values[f"wall_{part}_seconds"] for part in PARTS if values[f"wall_{part}_seconds"]}


def test_every_second_is_in_one_part(tmp_path: Path) -> None:
    clock = Clock(1010.0)
    wall = WallTime(tmp_path, at_step(tmp_path, 0), started_at=1000.0, clock=clock)
    clock.now += 5.0
    run_steps(wall, clock, 3, wait=1.0, step=4.0)
    with wall.part("evaluation"):
        clock.now += 7.0
        with wall.part("checkpoint"):
            clock.now += 2.0
        clock.now += 1.0
    # The first wait for data ends the start.
    assert parts_of(wall) == {"initialise": 16.0, "data_wait": 2.0, "step": 12.0, "evaluation": 8.0, "checkpoint": 2.0}
    assert wall.values()["goodput"] == 12.0 / 40.0
    wall.close(stopped_on_request=False)


def test_steps_that_are_repeated_are_lost_and_the_time_until_the_next_step_is_the_restart(tmp_path: Path) -> None:
    clock = Clock(0.0)
    wall = WallTime(tmp_path, at_step(tmp_path, 0), started_at=0.0, clock=clock)
    run_steps(wall, clock, 10, wait=1.0, step=4.0)
    with wall.part("checkpoint"):
        clock.now += 3.0
    run_steps(wall, clock, 6, wait=1.0, step=4.0)
    killed(wall)
    interrupted = clock.now
    # The command comes 20 s later, and takes 10 to get to its first step.
    clock.now += 30.0
    wall = WallTime(tmp_path, at_step(tmp_path, 10), started_at=interrupted + 20.0, clock=clock)
    run_steps(wall, clock, 6, wait=1.0, step=4.0)
    found = parts_of(wall)
    assert found["lost_work"] == 6 * 5.0 and wall.values()["lost_steps"] == 6
    assert found["step"] == 16 * 4.0 and found["checkpoint"] == 3.0
    assert found["restart"] == 30.0 + 1.0
    assert wall.values()["wall_seconds"] == clock.now
    wall.close(stopped_on_request=False)


def test_a_resume_from_an_older_checkpoint_loses_what_came_after_that_one(tmp_path: Path) -> None:
    """The newest may be damaged; and a run that fails again before its first step loses nothing twice."""
    clock = Clock(0.0)
    wall = WallTime(tmp_path, at_step(tmp_path, 0), started_at=0.0, clock=clock)
    for _ in range(3):
        run_steps(wall, clock, 10, wait=0.0, step=1.0)
        with wall.part("checkpoint"):
            clock.now += 1.0
    killed(wall)
    for outage in (1, 2):
        clock.now += 5.0
        wall = WallTime(tmp_path, at_step(tmp_path, 20), started_at=clock.now, clock=clock)
        assert parts_of(wall) == {"step": 20.0, "checkpoint": 3.0, "lost_work": 10.0, "restart": 5.0 * outage}
        killed(wall)
    clock.now += 5.0
    wall = WallTime(tmp_path, at_step(tmp_path, 0), started_at=clock.now, clock=clock)
    assert parts_of(wall)["lost_work"] == 30.0 and wall.values()["lost_steps"] == 30
    assert parts_of(wall)["restart"] == 15.0
    wall.close(stopped_on_request=False)


def test_the_pause_after_a_stop_on_request_is_nobodys_time(tmp_path: Path) -> None:
    clock = Clock(0.0)
    wall = WallTime(tmp_path, at_step(tmp_path, 0), started_at=0.0, clock=clock)
    run_steps(wall, clock, 5, wait=0.0, step=2.0)
    with wall.part("checkpoint"):
        clock.now += 1.0
    wall.close(stopped_on_request=True)
    clock.now += 86_400.0
    wall = WallTime(tmp_path, at_step(tmp_path, 5), started_at=clock.now - 12.0, clock=clock)
    assert parts_of(wall) == {"step": 10.0, "checkpoint": 1.0, "restart": 12.0}
    wall.close(stopped_on_request=False)


def test_the_file_says_how_far_it_went_while_a_part_lasts(tmp_path: Path) -> None:
    """A process killed in a long evaluation leaves the evaluation's time, not a gap."""
    wall = WallTime(tmp_path, at_step(tmp_path, 0), started_at=time.time())
    with wall.part("evaluation"):
        time.sleep(1.3)
        left = json.loads((tmp_path / FILE).read_text())
    wall.close(stopped_on_request=False)
    assert 0.3 < left["seconds"]["evaluation"] < 1.4


@pytest.mark.parametrize("content", ["", '{"seconds": {'])
def test_a_torn_file_is_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    clock = Clock(100.0)
    wall = WallTime(tmp_path, at_step(tmp_path, 7), started_at=90.0, clock=clock)
    assert parts_of(wall) == {"initialise": 10.0}
    wall.close(stopped_on_request=False)
