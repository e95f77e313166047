"""Where workers stand, given the nodes and GPUs that Ray put them on, and what is told of those that failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError

from vae_dist.errors import VaeDistError
from vae_dist.launch import workers
from vae_dist.launch.cluster import WorkerGroup
from vae_dist.launch.supervise import WorkersLostError
from vae_dist.launch.trainer import _plain
from vae_dist.launch.workers import Rank, WorkersFailedError, number


def test_workers_of_one_node_are_neighbours() -> None:
    ranks = number([("a", []), ("b", []), ("a", []), ("c", []), ("b", []), ("a", [])])
    assert [rank.rank for rank in ranks] == [0, 3, 1, 5, 4, 2]
    assert [rank.local_rank for rank in ranks] == [0, 0, 1, 0, 1, 2]
    assert [rank.local_world_size for rank in ranks] == [3, 2, 3, 1, 2, 3]
    assert [rank.node_rank for rank in ranks] == [0, 1, 0, 2, 1, 0]
    assert {rank.world_size for rank in ranks} == {6}
    assert [rank.gpus for rank in ranks] == [[]] * 6


def test_workers_of_a_node_see_each_others_gpus() -> None:
    """In the order of their local ranks, by which torch numbers them; the node's other GPUs belong to others."""
    ranks = number([("a", ["3"]), ("b", ["GPU-5f"]), ("a", ["1"]), ("b", ["GPU-2c"])])
    assert ranks[0] == Rank(0, 4, 0, 2, 0, ["3", "1"])
    assert ranks[2] == Rank(1, 4, 1, 2, 0, ["3", "1"])
    assert [rank.gpus[rank.local_rank] for rank in ranks] == ["3", "GPU-5f", "1", "GPU-2c"]


class RefusedError(VaeDistError):
    """For the user."""


class LockedError(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("locked")
        self.lines = (line for line in "abc")


def raised(error: BaseException) -> Exception:
    """What `ray.get` raises for it: it went from process to process, and left its traceback behind."""
    return RayTaskError("run", f"Traceback: in train_step, line 7\n{error!r}", error, ip="::1").as_instanceof_cause()


def test_an_error_that_nobody_foresaw_is_told_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Any = SimpleNamespace(run_dir=Path("/nowhere"), started_at=0.0)
    for error in (ValueError("odd"), LockedError(), OSError(28, "No space left on device")):

        def get(call: Any, error: BaseException = error) -> NoReturn:
            raise raised(error)

        monkeypatch.setattr(ray, "get", get)
        found = workers._error(None)
        assert found is not None and not workers._is_plain(found), "another rank may know better"
        told = _plain(WorkersFailedError([found]), plan)
        assert isinstance(told, WorkersLostError)
        assert "train_step, line 7" in told.message and type(error).__name__ in told.message, told.message


def test_what_a_worker_says_for_the_user_and_its_death_need_nobody_to_explain_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for error, kind in ((raised(RefusedError("Do this.")), RefusedError), (ActorDiedError(), ActorDiedError)):

        def get(call: Any, error: Exception = error) -> NoReturn:
            raise error

        monkeypatch.setattr(ray, "get", get)
        found = workers._error(None)
        assert type(found) is kind and workers._is_plain(found)


def test_a_run_that_waits_for_room_minds_a_lost_node_where_it_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, told, removed = {"a": 2, "b": 1, "c": 1}, [], []

    def nodes() -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": True, "Resources": {"CPU": float(cpus)}} for name, cpus in cluster.items()]

    def wait(seconds: float) -> bool:
        cluster.pop("b", None) or cluster.pop("c", None)
        return False

    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(workers, "placement_group", lambda *a, **k: SimpleNamespace(wait=wait))
    monkeypatch.setattr(workers, "remove_placement_group", removed.append)
    monkeypatch.setattr(workers, "say", told.append)
    with pytest.raises(WorkersFailedError, match="A node was lost"):
        workers._reserve(WorkerGroup(3, 1, False))
    assert len(told) == 1 and len(removed) == 1, "three still fitted without the first node, not without the second"
