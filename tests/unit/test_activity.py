"""What a rank does: the spans of a trace, the time it takes by itself, and what the files of a hang say."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from vae_dist.engine.stragglers import Stragglers
from vae_dist.engine.watchdog import hang_message
from vae_dist.observe.activity import Activity

CPU = torch.device("cpu")


def dump(folder: Path, rank: int, changes: int, span: str) -> None:
    about = {"step": 8, "span": span, "changes": changes, "seconds": 301.5}
    (folder / f"rank-{rank:05d}.txt").write_text(json.dumps(about) + "\n\nThread ...\n")


def test_only_the_chosen_steps_are_traced(tmp_path: Path) -> None:
    activity = Activity(tmp_path, 3, CPU, (3, 4))
    for step in range(6):
        with activity.span("forward"), activity.span("reduce"):
            pass
        activity.step = step + 1
    activity.close()
    _, *lines = (tmp_path / "trace/rank-00003.jsonl").read_text().splitlines()
    events = [json.loads(line.removesuffix(",")) for line in lines]
    traced = [(event["name"], event["args"]["step"], event["pid"]) for event in events[1:]]
    assert traced == [(name, step, 3) for step in (3, 4) for name in ("reduce", "forward")]


def test_time_alone_is_of_spans_that_wait_for_nobody() -> None:
    activity, began = Activity(Path("none"), 0, CPU), time.monotonic()
    for name in ("data_wait", "forward", "agree", "backward", "reduce", "optimizer"):
        with activity.span(name):
            time.sleep(0.05)
    # The other four took a fifth of a second at least.
    assert 0.099 < activity.take_alone_seconds() < time.monotonic() - began - 0.199
    assert activity.take_alone_seconds() == 0.0
    assert activity.changes == 12 and activity.name == ""


def test_the_profiler_covers_the_traced_steps_and_leaves_a_whole_file(tmp_path: Path) -> None:
    activity = Activity(tmp_path, 0, CPU, (2, 3), profile=True)
    for step in range(5):
        activity.before_step()
        with torch.profiler.record_function(f"step number {step + 1}"):
            torch.ones(10).sum()
        activity.step = step + 1
    activity.close()
    names = {
        event.get("name")
        for event in json.loads((tmp_path / "trace/profile-rank-00000.json").read_text())["traceEvents"]
    }
    assert {f"step number {step}" for step in range(1, 6)} & names == {"step number 2", "step number 3"}


def test_a_rank_is_named_when_it_becomes_slow_and_when_it_does_so_again() -> None:
    stragglers = Stragglers(["a", "b", "c"], factor=1.5)
    assert stragglers.find([0.0, 0.0, 0.0]) == ([], 1.0)
    assert stragglers.find([1.0, 1.4, 1.1]) == ([], pytest.approx(1.4 / 1.1))
    (sentence,), ratio = stragglers.find([2.0, 8.0, 2.0])
    assert sentence.startswith("rank 1 on b is slow") and "8 s" in sentence and "4.0 times" in sentence and ratio == 4.0
    assert stragglers.find([2.0, 9.0, 2.0]) == ([], 4.5)
    assert stragglers.find([2.0, 2.0, 2.0]) == ([], 1.0)
    assert len(stragglers.find([2.0, 9.0, 4.0])[0]) == 1
    # Moments are judged together.
    assert stragglers.find([0.1, 0.1, 0.4]) == ([], pytest.approx(4.0))
    assert stragglers.find([0.3, 0.3, 0.1]) == ([], pytest.approx(1.25))
    (sentence,), _ = stragglers.find([0.1, 0.1, 0.6])
    assert sentence.startswith("rank 2 on c is slow") and "1.1 s" in sentence
    # Of two ranks the faster one is what is compared with.
    assert len(Stragglers(["a", "b"], 1.5).find([1.0, 1.6])[0]) == 1


def test_the_late_rank_is_the_one_behind_or_the_one_that_is_silent(tmp_path: Path) -> None:
    assert hang_message(tmp_path) is None
    folder = tmp_path / "hang"
    folder.mkdir()
    (folder / "hosts.json").write_text(json.dumps(["a", "b", "b", "c"]))
    assert hang_message(tmp_path) is None
    for rank in (0, 1, 3):
        dump(folder, rank, changes=40 if rank == 1 else 43, span="data_wait" if rank == 1 else "agree")
    message = hang_message(tmp_path)
    assert message is not None and message.startswith("Step 8 did not end: nothing happened for 302 s.")
    assert "rank 2 on b wrote no stack" in message and "rank 1 on b, in data_wait" in message
    assert "rank 0" not in message and "rank 3" not in message
    assert hang_message(tmp_path, since=time.time() + 60.0) is None
    dump(folder, 1, 43, "agree")
    dump(folder, 2, 43, "agree")
    assert "all ranks are equally far" in str(hang_message(tmp_path))
