"""When workers are started again: what counts as progress, and a stop that finds nobody to be told.

Ray is left out; `tests/faults` has it.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vae_dist.config.load import load_config
from vae_dist.engine import lock
from vae_dist.errors import MachineError, RunError
from vae_dist.launch import supervise
from vae_dist.launch.cluster import WorkerGroup
from vae_dist.launch.supervise import Outcome, Supervisor, WorkersLostError
from vae_dist.observe.metrics import MetricsWriter

GROUP = WorkerGroup(2, 1, False)


class Flag:
    """Stands for the actor."""

    def __init__(self) -> None:
        self.is_up = False
        self.put_up = SimpleNamespace(remote=self._put_up)

    def _put_up(self) -> None:
        self.is_up = True


class Watch:
    """Sees nothing."""

    def __init__(self, *arguments: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


class Story:
    """What happens to each group of workers: the step that is reached, then an outcome or an error."""

    def __init__(self, run_dir: Path, *chapters: tuple[int, Outcome | Exception]) -> None:
        self.metrics, self.chapters = MetricsWriter(run_dir, 0), list(chapters)
        self.groups: list[WorkerGroup] = []
        self.flags: list[Flag] = []

    def train(self, group: WorkerGroup, flag: Flag) -> Outcome:
        self.groups.append(group)
        self.flags.append(flag)
        step, end = self.chapters.pop(0)
        self.metrics.write("train", step, {})
        if isinstance(end, Exception):
            raise end
        return end


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(supervise, "new_stop_flag", Flag)
    monkeypatch.setattr(supervise, "_Watch", Watch)
    monkeypatch.setattr(supervise, "_ROOM_SECONDS", 0.01)
    monkeypatch.setattr(supervise, "nodes_not_to_count_on", lambda seconds: frozenset())
    monkeypatch.setattr(supervise, "size_worker_group", lambda config, without: GROUP)
    config = load_config(None, ["cluster.max_restarts=2", "cluster.wait_seconds=1"])
    return SimpleNamespace(config=config, run_dir=tmp_path)


DONE = Outcome({"steps": 100}, 100)


def lost(step: int) -> tuple[int, Exception]:
    return step, WorkersLostError(f"lost at {step}")


def test_workers_that_get_further_are_started_again_for_ever(plan: Any, tmp_path: Path) -> None:
    story = Story(tmp_path, *(lost(step) for step in range(1, 50)), (100, DONE))
    assert Supervisor(plan, story.train).run(GROUP) == DONE
    assert len(story.groups) == 50 and not story.chapters


def test_workers_that_get_no_further_end_the_run(plan: Any, tmp_path: Path) -> None:
    # Lost at 40 and on the way there, started again twice, which is as often as may be, and further; then not.
    story = Story(tmp_path, *(lost(step) for step in (40, 31, 41, 41, 20)), (100, DONE))
    with pytest.raises(WorkersLostError, match="lost at 20"):
        Supervisor(plan, story.train).run(GROUP)
    assert len(story.groups) == 5


def test_workers_that_left_on_request_do_not_count_as_lost(plan: Any, tmp_path: Path) -> None:
    story = Story(tmp_path, *((7, Outcome(None, 7)) for _ in range(9)), (100, DONE))
    assert Supervisor(plan, story.train).run(GROUP) == DONE


def test_lost_workers_that_live_on_do_not_keep_the_run_directory(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do on a host that is cut off. Protected by `forget_writer` in `Supervisor.run`."""
    monkeypatch.setattr(lock, "_WAIT_SECONDS", 0)
    story = Story(tmp_path, lost(5), (100, DONE))
    with ExitStack() as living:

        def train(group: WorkerGroup, flag: Flag) -> Outcome:
            living.enter_context(lock.only_writer(tmp_path))
            return story.train(group, flag)

        assert Supervisor(plan, train).run(GROUP) == DONE


def test_a_stop_that_comes_between_two_groups_reaches_the_next(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(tmp_path, lost(5), (5, Outcome(None, 5)))
    supervisor = Supervisor(plan, story.train)

    def size(config: Any, without: Any) -> WorkerGroup:
        supervisor.stop()
        return GROUP

    monkeypatch.setattr(supervise, "size_worker_group", size)
    assert supervisor.run(GROUP) == Outcome(None, 5)
    assert story.flags[1].is_up


def test_waiting_for_room_ends_in_time_or_when_it_is_stopped(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size(config: Any, without: Any) -> WorkerGroup:
        raise MachineError("2 workers do not fit.")

    monkeypatch.setattr(supervise, "size_worker_group", size)
    with pytest.raises(MachineError, match=r"do not fit. Waited 1 s .* The same command resumes"):
        Supervisor(plan, Story(tmp_path, lost(5)).train).run(GROUP)
    supervisor = Supervisor(plan, Story(tmp_path, lost(5)).train)
    monkeypatch.setattr(supervise, "nodes_not_to_count_on", lambda seconds: supervisor.stop())
    with pytest.raises(RunError, match="Stopped while waiting for room: 2 workers do not fit"):
        supervisor.run(GROUP)
