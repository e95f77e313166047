"""Preparing data in several processes: the bytes of one, whatever the layout of the corpus; errors as themselves."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from support import write_repeated_corpus

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare import sampling
from vae_dist.data.prepare.prepare import prepare, prepare_cached
from vae_dist.data.prepare.tasks import run_here
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.filesystem import resolve
from vae_dist.errors import DataError, MachineError
from vae_dist.launch.prepare import executor, has_cluster, run_in_processes

GROUP_BYTES = 40_000
SMALL = {"max_tokens": 16, "member_sequences": 100, "shard_bytes": 32_768, "vocab_size": 500}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def backwards(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """An executor whose results come in the opposite order."""
    return map(function, list(items)[::-1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """6,500 sentences, 2,000 of them twice, in 9 groups."""
    return write_repeated_corpus(tmp_path_factory.mktemp("source"), 2000)


@pytest.mark.parametrize("deduplicate", ["none", "exact", "near"])
def test_the_bytes_do_not_depend_on_the_executor(source: str, tmp_path: Path, deduplicate: str) -> None:
    options = PrepareConfig(deduplicate=deduplicate, **SMALL)
    prepare(source, tmp_path / "whole", options)
    for name, run in (("here", run_here), ("backwards", backwards), ("three", partial(run_in_processes, 3))):
        if name != "three" or deduplicate == "exact":
            prepare(source, tmp_path / name, options, run=run, group_bytes=GROUP_BYTES)
            assert files(tmp_path / name) == files(tmp_path / "whole"), name
    assert len(files(tmp_path / "whole")) > 8


def test_the_bytes_do_not_depend_on_the_layout_of_the_corpus(source: str, tmp_path: Path) -> None:
    """One file, many, compressed, JSONL: the same shards; only the manifest names the files."""
    lines = Path(source).read_text(encoding="utf-8").splitlines()
    layouts: dict[str, list[tuple[str, str]]] = {
        "many": [(f"{i:03d}.txt", "\n".join(lines[i * 500 : (i + 1) * 500])) for i in range(13)],
        "packed": [("a.txt.gz", "\n".join(lines))],
        "json": [("a.jsonl", "\n".join(json.dumps({"text": line, "n": 1}) for line in lines))],
    }
    options = PrepareConfig(deduplicate="exact", **SMALL)
    prepare(source, tmp_path / "whole", options)
    named = ("manifest.json", "origin.json")
    expected = {name: data for name, data in files(tmp_path / "whole").items() if name not in named}
    assert len(expected) > 5
    for layout, contents in layouts.items():
        (tmp_path / layout).mkdir()
        for name, text in contents:
            data = text.encode()
            (tmp_path / layout / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        for size in (GROUP_BYTES, 1 << 20):
            out = tmp_path / f"out-{layout}-{size}"
            prepare(str(tmp_path / layout), out, options, group_bytes=size)
            assert {name: data for name, data in files(out).items() if name in expected} == expected, layout


def test_a_sample_does_not_depend_on_the_groups(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that cannot see all texts sees the same ones."""
    monkeypatch.setattr(sampling, "SAMPLE_CHARACTERS", 20_000)
    options = PrepareConfig(tokenizer="word", **{**SMALL, "vocab_size": 100})
    first = prepare(source, tmp_path / "one", options, group_bytes=GROUP_BYTES)
    second = prepare(source, tmp_path / "two", options, group_bytes=100_000, run=backwards)
    assert first.manifest_hash == second.manifest_hash
    monkeypatch.undo()
    whole = prepare(source, tmp_path / "whole", options)
    assert whole.tokenizer.sha256 != first.tokenizer.sha256


def broken(source: str, folder: Path) -> Path:
    path = folder / "broken.txt"
    path.write_bytes(Path(source).read_bytes() + b"\xff\n")
    return path


@pytest.mark.parametrize("run", [run_here, partial(run_in_processes, 2)], ids=["here", "processes"])
def test_a_failing_source_leaves_no_manifest(source: str, tmp_path: Path, run: Any) -> None:
    path = broken(source, tmp_path)
    with pytest.raises(DataError, match="is not UTF-8: byte 0xff at offset") as caught:
        prepare(str(path), tmp_path / "out", PrepareConfig(), run=run, group_bytes=GROUP_BYTES)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    # Mended, it is prepared.
    path.write_bytes(Path(source).read_bytes())
    assert prepare(str(path), tmp_path / "out", PrepareConfig(), group_bytes=GROUP_BYTES).splits


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(MachineError, match="fewer --workers"):
        list(run_in_processes(2, die, range(8)))


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def test_processes_do_all_tasks_elsewhere() -> None:
    found = list(run_in_processes(3, square, range(50)))
    assert sorted(value for value, _ in found) == [n * n for n in range(50)]
    assert os.getpid() not in {pid for _, pid in found}


def test_one_task_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever cluster there may be: it is not asked."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert has_cluster()
    assert list(executor()(square, [7])) == [(49, os.getpid())]
    monkeypatch.delenv("RAY_ADDRESS")
    assert not has_cluster()
    assert list(executor(1)(square, [1, 2])) == [(1, os.getpid()), (4, os.getpid())]
    assert {pid for _, pid in executor(2)(square, [1, 2])} != {os.getpid()}


def test_an_object_store(source: str, tmp_path: Path) -> None:
    """Through fsspec's store in memory, which other processes do not see; the bytes are those of a directory."""
    options = PrepareConfig(**SMALL)
    url = "memory://bucket/prepared"
    dataset = prepare(source, url, options, cache_dir=tmp_path, group_bytes=GROUP_BYTES)
    prepare(source, tmp_path / "here", options)
    filesystem, inner = resolve(url)
    listed = filesystem.get_file_info(fs.FileSelector(inner, recursive=True))
    found = {info.base_name: filesystem.open_input_stream(info.path).read() for info in listed if info.is_file}
    assert found == files(tmp_path / "here")
    assert dataset.manifest_hash == Dataset.open(tmp_path / "here").manifest_hash
    # It is there: opened, not made again.
    assert prepare(source, url, options, cache_dir=tmp_path).manifest_hash == dataset.manifest_hash
    with pytest.raises(DataError, match="holds another data set"):
        prepare(source, url, PrepareConfig(), cache_dir=tmp_path)


def test_prepare_cached_runs_the_tasks_it_is_given(source: str, tmp_path: Path) -> None:
    stages: list[int] = []

    def counted(function: Any, items: Any) -> Any:
        stages.append(len(items))
        return map(function, items)

    prepare_cached(source, PrepareConfig(**SMALL), tmp_path, run=counted)
    # The sample and the encoding of one group, then the shards.
    assert stages[:2] == [1, 1]
    stages.clear()
    prepare_cached(source, PrepareConfig(**SMALL), tmp_path, run=counted)
    assert stages == []


def environment_of(name: str) -> str | None:
    return os.environ.get(name)


def test_processes_have_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as credentials that were set after the first processes were started."""
    assert list(run_in_processes(2, environment_of, ["VAE_TEST_SECRET"] * 2)) == [None, None]
    monkeypatch.setenv("VAE_TEST_SECRET", "open")
    assert list(run_in_processes(2, environment_of, ["VAE_TEST_SECRET"] * 2)) == ["open", "open"]
