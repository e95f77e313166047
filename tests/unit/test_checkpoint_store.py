"""Checkpoints, in the run directory and in a store: which is whole, which is chosen, which stay."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from disks import disk
from safetensors.torch import save_file
from support import flip, truncate

from vae_dist.config.schema import RunConfig
from vae_dist.data.store.folder import Folder
from vae_dist.engine.checkpoint_files import (
    FORMAT_VERSION,
    Progress,
    States,
    commit,
    damage,
    file_entry,
    read_progress,
)
from vae_dist.engine.checkpoint_store import CheckpointStore, newest_whole, open_store, retain
from vae_dist.errors import CheckpointError, DataError

STATE = "state-00001-of-00002.safetensors"


@dataclass
class Kept:
    """A store, a directory of checkpoints as the run names it, and where they really lie."""

    store: CheckpointStore
    directory: Path
    really: Path

    def write(self, step: int, version: int = FORMAT_VERSION) -> Path:
        """As two ranks do; returns where it really lies."""
        path = self.directory / f"step-{step:08d}"
        path.mkdir(parents=True)
        entries = []
        for rank in range(2):
            value = torch.arange(4.0) + 10 * rank + step
            state = {f"p{rank}": value, f"p{rank}::exp_avg": value / 2, f"p{rank}::exp_avg_sq": value**2}
            file = path / f"state-{rank:05d}-of-00002.safetensors"
            save_file(state, file)
            entries.append(file_entry(file))
        progress = {"step": step, "tokens_seen": 1000 * step, "controllers": {"best": [-3.5, step]}}
        commit(path, {"format_version": version, **progress}, entries)
        for file in sorted(path.iterdir()):
            self.store.put(file)
        self.store.written(path)
        return self.really / path.name

    def newest(self) -> Path | None:
        return newest_whole(self.store, self.directory)

    @property
    def is_remote(self) -> bool:
        return self.directory != self.really


def keep(where: str, folder: Path, result_hash: str = "abc" * 20) -> Kept:
    run, there = folder / "runs/one", folder / "store"
    run.mkdir(parents=True, exist_ok=True)
    config = RunConfig(checkpoint_url=f"file://{there}/" if where == "store" else None)
    store, directory = open_store(config, run, result_hash), run / "checkpoints"
    return Kept(store, directory, directory if where == "directory" else there / f"one/{result_hash[:12]}/checkpoints")


@pytest.fixture(params=["directory", "store"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    return keep(request.param, tmp_path)


def test_a_checkpoint_comes_back(kept: Kept) -> None:
    really = kept.write(7)
    assert not kept.is_remote or list(kept.directory.iterdir()) == [], "nothing stays on the disk of who wrote it"
    path = kept.newest()
    assert path == kept.directory / "step-00000007"
    assert damage(path) is None
    assert read_progress(path) == Progress(7, 7000, {"best": [-3.5, 7]})
    states = States(path)
    assert sorted(states) == ["p0", "p1"]
    wanted = torch.arange(4.0) + 17
    assert states["p1"].name == "p1"
    assert torch.equal(states["p1"].weight, wanted)
    assert states["p1"].slots.keys() == {"exp_avg", "exp_avg_sq"}
    assert torch.equal(states["p1"].slots["exp_avg"], wanted / 2)
    assert torch.equal(states["p1"].slots["exp_avg_sq"], wanted**2)
    kept.store.release(path)
    assert damage(really) is None
    assert not kept.is_remote or list(kept.directory.iterdir()) == [], "nor on that of who read it"


def test_a_checkpoint_of_another_version_is_refused_with_the_way_out(kept: Kept) -> None:
    with pytest.raises(CheckpointError, match="format version 1; this vae_dist reads 2"):
        read_progress(kept.write(7, version=1))


def test_the_newest_is_the_one_with_the_most_steps(kept: Kept) -> None:
    for step in (30, 4, 100, 9):
        kept.write(step)
    assert kept.newest() == kept.directory / "step-00000100"
    retain(kept.store, kept.directory, 2, kept.directory / "step-00000100")
    assert sorted(p.name for p in kept.really.iterdir()) == ["step-00000030", "step-00000100"]


def test_what_was_never_finished_does_not_stay_in_place_of_what_was(kept: Kept) -> None:
    for step in (10, 20, 30):
        kept.write(step)
    (kept.really / "step-00000020/manifest.json").unlink()
    retain(kept.store, kept.directory, 2, kept.directory / "step-00000030")
    assert sorted(p.name for p in kept.really.iterdir()) == ["step-00000010", "step-00000030"]


def test_what_a_run_left_behind_when_it_went_back_is_not_kept_in_place_of_what_it_wrote(kept: Kept) -> None:
    """Steps 30 and 40 were damaged and passed over; the run goes on from 10 and writes 20."""
    for step in (10, 20, 30, 40):
        kept.write(step)
    for step in (30, 40):
        flip(kept.really / f"step-{step:08d}" / STATE, -3)
    retain(kept.store, kept.directory, 1, kept.directory / "step-00000020")
    assert kept.newest() == kept.directory / "step-00000020"
    assert [p.name for p in kept.really.iterdir()] == ["step-00000020"]


def test_files_of_a_try_that_was_not_finished_are_not_read(kept: Kept) -> None:
    """Killed while four workers wrote this step, resumed with two, which wrote it whole."""
    really = kept.write(7)
    save_file({"p0": torch.full((4,), 99.0), "p9": torch.ones(1)}, really / "state-00003-of-00004.safetensors")
    path = kept.newest()
    assert path is not None
    states = States(path)
    assert sorted(states) == ["p0", "p1"]
    assert torch.equal(states["p0"].weight, torch.arange(4.0) + 7)


def test_runs_of_one_name_and_other_configurations_are_kept_apart(tmp_path: Path) -> None:
    one, other = keep("store", tmp_path, "0" * 64), keep("store", tmp_path, "1" * 64)
    one.write(5)
    assert one.newest() is not None and other.newest() is None


CHECKPOINT_DAMAGES = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
    "truncated file": (lambda p: truncate(p / STATE), f"{STATE} has .* bytes, not"),
    "flipped byte": (lambda p: flip(p / STATE, -3), f"{STATE} does not match its hash"),
    "flipped progress": (lambda p: flip(p / "state.json", -2), "state.json does not match its hash"),
    "missing file": (lambda p: (p / STATE).unlink(), f"{STATE} is missing"),
    "missing progress": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "truncated manifest": (lambda p: truncate(p / "manifest.json"), "manifest.json is not readable"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "manifest.json is not readable"),
    "manifest of something else": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json is not readable"),
    "files is a number": (lambda p: (p / "manifest.json").write_text('{"files": 3}'), "manifest.json is not readable"),
    "nameless file": (lambda p: (p / "manifest.json").write_text('{"files": [{}]}'), "manifest.json is not readable"),
    "not text": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe{}"), "manifest.json is not readable"),
}


@pytest.mark.parametrize("name", CHECKPOINT_DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(kept: Kept, name: str, caplog: pytest.LogCaptureFixture) -> None:
    kept.write(10)
    really = kept.write(20)
    harm, problem = CHECKPOINT_DAMAGES[name]
    harm(really)
    with caplog.at_level(logging.WARNING):
        assert kept.newest() == kept.directory / "step-00000010"
    assert str(kept.directory / "step-00000020") in caplog.text and re.search(problem, caplog.text)
    assert not kept.is_remote or sorted(p.name for p in kept.directory.iterdir()) == [
        "step-00000010",
        "step-00000010.lock",
    ]


def test_a_manifest_names_no_file_elsewhere(tmp_path: Path) -> None:
    kept = keep("store", tmp_path)
    really = kept.write(7)
    manifest = (really / "manifest.json").read_text().replace(STATE, "../../../prey")
    (really / "manifest.json").write_text(manifest)
    assert kept.newest() is None
    assert not list(tmp_path.rglob("prey"))


def test_nothing_there_is_no_checkpoint(kept: Kept) -> None:
    assert kept.newest() is None
    (kept.really / "step-00000010").mkdir(parents=True)
    (kept.really / "step-00000011").touch()
    assert kept.newest() is None


def test_the_manifest_is_the_commit_point(kept: Kept) -> None:
    really = kept.write(10)
    (really / "manifest.json").rename(really / "manifest.json.tmp")
    assert kept.newest() is None


def test_unreadable_state_names_the_file(kept: Kept) -> None:
    kept.write(10)
    path = kept.newest()
    assert path is not None
    (path / STATE).write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match=f"{STATE} is not readable"):
        States(path)


def test_a_bucket_that_is_not_there_is_told_before_the_first_step(tmp_path: Path, s3_port: int) -> None:
    place = f"scheme=http&endpoint_override=127.0.0.1:{s3_port}&region=us-east-1"
    store = open_store(RunConfig(checkpoint_url=f"s3://k:s@no-bucket/x?{place}"), tmp_path, "0" * 64)
    assert store.listed(tmp_path / "checkpoints") == {}, "it lists as an empty one"
    with pytest.raises(DataError, match=r"no-bucket/x/.* cannot be written: .*NO_SUCH_BUCKET"):
        store.prepare()


def test_a_place_that_cannot_be_written_is_told_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = open_store(RunConfig(checkpoint_url=f"file://{tmp_path}/file"), tmp_path, "0" * 64)
    with pytest.raises(DataError, match="cannot be written"):
        store.prepare()
    kept = keep("store", tmp_path)
    kept.store.prepare()
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()], "nothing stays of the trial"


def test_a_disk_without_room_for_a_checkpoint_is_told_with_the_way_out(tmp_path: Path) -> None:
    with disk(tmp_path / "runs", 4) as small:
        kept = keep("store", tmp_path)
        kept.write(7)
        small.fill()
        with pytest.raises(CheckpointError, match=r"No space left on device \(on .*Make room"):
            kept.newest()
        small.free()
        assert kept.newest() == kept.directory / "step-00000007"


def test_a_deletion_whose_answer_was_lost_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep("store", tmp_path)
    really, delete, asked = kept.write(7), Folder.delete, []
    monkeypatch.setattr(kept.store._writes, "is_remote", True)  # type: ignore[attr-defined]

    def lost(folder: Folder, names: list[str]) -> None:
        delete(folder, names)
        asked.append(names)
        raise OSError("the connection was closed")

    monkeypatch.setattr(Folder, "delete", lost)
    kept.store.discard(kept.directory / really.name)
    assert len(asked) == 1 and not really.exists()


def test_a_lock_that_a_killed_process_left_is_no_checkpoint(kept: Kept) -> None:
    kept.write(7)
    kept.directory.mkdir(parents=True, exist_ok=True)
    (kept.directory / "step-00000007.lock").touch()
    assert list(kept.store.listed(kept.directory)) == ["step-00000007"]
    retain(kept.store, kept.directory, 1, kept.directory / "step-00000007")


def test_a_manifest_is_not_written_for_a_file_on_a_disk_that_is_not_shared(kept: Kept) -> None:
    """Rank 1 wrote its file on another host, where rank 0 does not see it: nobody could resume from it."""
    from vae_dist.engine.checkpoint import _commit

    path = kept.directory / "step-00000007"
    path.mkdir(parents=True)
    names = [f"state-{rank:05d}-of-00002.safetensors" for rank in range(2)]
    for name in names:
        save_file({"p": torch.ones(3)}, path / name)
    entries = [file_entry(path / name) for name in names]
    kept.store.put(path / names[0])
    (path / names[1]).unlink()
    state = {"format_version": FORMAT_VERSION, "step": 7, "tokens_seen": 0, "controllers": {}}
    with pytest.raises(CheckpointError, match=f"{names[1]} cannot be seen"):
        _commit(path, state, entries, kept.store)
    assert kept.newest() is None
    path.mkdir(exist_ok=True)
    save_file({"p": torch.ones(3)}, path / names[1])
    kept.store.put(path / names[1])
    _commit(path, state, entries, kept.store)
    assert kept.newest() == path
