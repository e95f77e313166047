"""A prepare that is killed goes on where it stopped; one of another plan starts afresh; nothing else is deleted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, wait_for, write_repeated_corpus

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.claim import MARKER, WORK
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.store.dataset import Dataset
from vae_dist.errors import DataError, MachineError

GROUP_BYTES = 30_000
OPTIONS = PrepareConfig(deduplicate="exact", max_tokens=16, member_sequences=100, shard_bytes=16_384, vocab_size=500)
# Runs until a number of tasks of a stage are finished, says so, and waits to be killed.
SCRIPT = """
import sys, time
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.launch.prepare import run_in_processes

source, out, options, stage, tasks, workers = sys.argv[1:]

def run(function, items):
    results = run_in_processes(int(workers), function, items) if int(workers) > 1 else map(function, items)
    for count, result in enumerate(results):
        if function.stage == stage and count == int(tasks):
            print("here", flush=True)
            time.sleep(100)
        yield result

if __name__ == "__main__":
    prepare(source, out, PrepareConfig.model_validate_json(options), run=run, group_bytes=30_000)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sentences, the first 1,000 twice, in 9 groups."""
    return write_repeated_corpus(tmp_path_factory.mktemp("source"), 1000)


@pytest.fixture(scope="module")
def undisturbed(source: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a prepare that nobody killed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(source, out, OPTIONS, group_bytes=GROUP_BYTES)
    return files(out)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def killed(source: str, out: Path, stage: str, tasks: int, workers: int = 1) -> None:
    """Start a prepare and kill it when so many tasks of a stage, and one more, are finished."""
    command = [sys.executable, "-c", SCRIPT, source, str(out), OPTIONS.model_dump_json(), stage, str(tasks)]
    # By the environment its processes are told from others.
    environment = {**os.environ, "KILLED": str(out)}
    process = subprocess.Popen([*command, str(workers)], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        Dataset.open(out)


def processes(out: Path) -> list[str]:
    """Ids of the processes of the prepare that was killed."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"KILLED={out}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


class Counting:
    """An executor that counts tasks by stage."""

    def __init__(self) -> None:
        self.tasks: Counter[str] = Counter()

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        self.tasks[function.stage] += len(items)  # type: ignore[attr-defined]
        return map(function, items)


STAGES = ("fingerprints", "duplicates", "sample", "encode", "shards")


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_prepare_goes_on(source: str, undisturbed: dict[str, bytes], tmp_path: Path, stage: str) -> None:
    every, rest = Counting(), Counting()
    prepare(source, tmp_path / "whole", OPTIONS, run=every, group_bytes=GROUP_BYTES)
    done = 0 if stage == "duplicates" else 2
    killed(source, tmp_path / "out", stage, done)
    # What a writer of other shards may have left, and a half-written one.
    (tmp_path / "out" / "train-000099.tar").write_bytes(b"left over")
    (tmp_path / "out" / "train-000000.tar.123.tmp").write_bytes(b"half")
    prepare(source, tmp_path / "out", OPTIONS, run=rest, group_bytes=GROUP_BYTES)
    assert files(tmp_path / "out") == undisturbed
    assert not (tmp_path / "out" / WORK).exists()
    expected = {name: every.tasks[name] for name in STAGES[STAGES.index(stage) + 1 :]}
    # The tokenizer is there: its sample is not asked for.
    assert +rest.tasks == Counter({stage: every.tasks[stage] - done - 1, **expected}) | Counter()
    assert all(every.tasks[name] > 4 for name in ("fingerprints", "sample", "encode", "shards"))


def test_processes_end_with_a_parent_that_is_killed(source: str, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    killed(source, tmp_path / "out", "encode", 3, workers=2)
    wait_for(lambda: not processes(tmp_path / "out"), 20, "the processes to end")
    rest = Counting()
    prepare(source, tmp_path / "out", OPTIONS, run=rest, group_bytes=GROUP_BYTES)
    groups = -(-Path(source).stat().st_size // GROUP_BYTES)
    # Four were finished when it was killed, and perhaps more.
    assert 0 < rest.tasks["encode"] <= groups - 4
    assert files(tmp_path / "out") == undisturbed


def test_another_plan_starts_afresh(source: str, tmp_path: Path) -> None:
    killed(source, tmp_path / "out", "shards", 3)
    other = OPTIONS.model_copy(update={"max_tokens": 9, "deduplicate": "none"})
    counting = Counting()
    prepare(source, tmp_path / "out", other, run=counting, group_bytes=GROUP_BYTES)
    prepare(source, tmp_path / "clean", other, group_bytes=GROUP_BYTES)
    assert files(tmp_path / "out") == files(tmp_path / "clean")
    assert counting.tasks["encode"] > 6


def test_a_source_that_changed_starts_afresh(source: str, tmp_path: Path) -> None:
    copy = tmp_path / "corpus.txt"
    copy.write_bytes(Path(source).read_bytes())
    killed(str(copy), tmp_path / "out", "encode", 3)
    # Of the same size.
    copy.write_bytes(Path(source).read_bytes().replace(b"sailor", b"farmer"))
    os.utime(copy, (1, 1))
    prepare(str(copy), tmp_path / "out", OPTIONS, group_bytes=GROUP_BYTES)
    prepare(str(copy), tmp_path / "clean", OPTIONS, group_bytes=GROUP_BYTES)
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def test_only_what_prepares_write_is_deleted(source: str, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    killed(source, tmp_path / "out", "encode", 1)
    foreign = {"notes.txt": b"mine", "train.tar": b"mine", "train-000000.tar.gz": b"mine", "index.arrow.bak": b"mine"}
    for name, data in foreign.items():
        (tmp_path / "out" / name).write_bytes(data)
    (tmp_path / "out" / "folder").mkdir()
    (tmp_path / "out" / "folder" / "train-000000.tar").write_bytes(b"mine")
    plan = tmp_path / "out" / WORK / "plan.json"
    plan.write_text("{", encoding="utf-8")
    prepare(source, tmp_path / "out", OPTIONS, group_bytes=GROUP_BYTES)
    assert files(tmp_path / "out") == {**undisturbed, **foreign}
    assert files(tmp_path / "out" / "folder") == {"train-000000.tar": b"mine"}


def test_killed_after_the_manifest(source: str, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """The data set is whole, and is tidied up."""
    prepare(source, tmp_path / "out", OPTIONS, group_bytes=GROUP_BYTES)
    (tmp_path / "out" / MARKER).touch()
    (tmp_path / "out" / WORK).mkdir()
    counting = Counting()
    prepare(source, tmp_path / "out", OPTIONS, run=counting)
    assert +counting.tasks == Counter()
    assert files(tmp_path / "out") == undisturbed
    assert not (tmp_path / "out" / WORK).exists()


def test_a_task_that_does_not_see_the_folder_says_so(source: str, tmp_path: Path) -> None:
    """As on a machine that does not share it."""

    def elsewhere(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        (tmp_path / "out" / WORK / "plan.json").unlink()
        return map(function, items)

    with pytest.raises(DataError, match="into a directory that all of them share"):
        prepare(source, tmp_path / "out", OPTIONS, run=elsewhere)


def test_a_task_that_cannot_write_says_so(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="No space left on device"):
        prepare(source, tmp_path / "out", OPTIONS)
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_work_file_that_is_cut_short_is_named(source: str, tmp_path: Path) -> None:
    killed(source, tmp_path / "out", "shards", 1)
    work = tmp_path / "out" / WORK
    path = work / "encode-000004.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{path.name} ends at byte 100"):
        prepare(source, tmp_path / "out", OPTIONS, group_bytes=GROUP_BYTES)


def test_a_work_file_that_is_damaged_is_refused(source: str, tmp_path: Path) -> None:
    killed(source, tmp_path / "out", "shards", 1)
    path = tmp_path / "out" / WORK / "encode-000004.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="of a work file are not the ones that were written"):
        prepare(source, tmp_path / "out", OPTIONS, group_bytes=GROUP_BYTES)
