"""Reading byte ranges: local files, a store that fails by script, and the cache on disk."""

import errno
import fcntl
import logging
import multiprocessing
import os
import resource
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from pyarrow import fs
from support import wait_for

from vae_dist.data.store import filesystem as filesystem_module
from vae_dist.data.store.filesystem import resolve
from vae_dist.data.store.range_cache import RangeCache
from vae_dist.data.store.ranges import RangeReader
from vae_dist.data.store.retry import RetryPolicy
from vae_dist.errors import DataError

CONTENT = np.random.default_rng(0).bytes(10_000)
FAST = RetryPolicy(attempts=4, first_delay_seconds=0.001, max_delay_seconds=0.002, read_bytes=1000)

Fault = Callable[[bytes], bytes]


class ScriptedStore(fsspec.AbstractFileSystem):
    """A store of one file; each entry of the script is what happens to one request, and then all goes well."""

    cachable = False

    def __init__(self, *script: Fault, forever: Fault | None = None) -> None:
        super().__init__()
        self.script, self.forever, self.requests = list(script), forever, []

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "size": len(CONTENT), "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.requests.append((start, end))
        fault = self.script.pop(0) if self.script else self.forever
        return fault(CONTENT[start:end]) if fault else CONTENT[start:end]

    def reader(self, retry: RetryPolicy = FAST, cache: RangeCache | None = None) -> RangeReader:
        return RangeReader(fs.PyFileSystem(fs.FSSpecHandler(self)), "bucket", cache, retry)


def fail(error: Exception) -> Fault:
    def raise_it(_: bytes) -> bytes:
        raise error

    return raise_it


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """150 files, more than are kept open, of different bytes."""
    for i in range(150):
        (tmp_path / f"{i}.tar").write_bytes(np.random.default_rng(i).bytes(2000 + i))
    return tmp_path


def most_descriptors(folder: Path) -> int:
    """Read at random from eight threads and compare; the largest number of descriptors seen."""
    reader = RangeReader(fs.LocalFileSystem(), str(folder))
    truth = {path.name: path.read_bytes() for path in folder.iterdir()}

    def check(seed: int) -> int:
        random, most = np.random.default_rng(seed), 0
        for name in random.choice(sorted(truth), 400):
            offset, size = (int(n) for n in random.integers(0, 1000, 2))
            assert reader.read(name, offset, size, "v").to_pybytes() == truth[name][offset : offset + size]
            most = max(most, len(os.listdir("/proc/self/fd")))
        return most

    with ThreadPoolExecutor(8) as pool:
        return max(pool.map(check, range(8)))


def test_local_ranges_from_many_threads(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    # 64 stay open; each thread may hold one that has just left the table, and a listing.
    assert most_descriptors(folder) - before <= 64 + 2 * 8
    assert len(os.listdir("/proc/self/fd")) == before


def test_local_damage_is_named(folder: Path) -> None:
    reader = RangeReader(fs.LocalFileSystem(), str(folder))
    message = error_of(lambda: reader.read("3.tar", 1500, 1000, "v"))
    assert f"{folder}/3.tar ends after byte 2003, but 2500 were written" in message
    assert f"{folder}/none.tar cannot be read at byte 7" in error_of(lambda: reader.read("none.tar", 7, 1, "v"))
    assert "Restore it" in message


def test_whole_files_and_sizes(folder: Path) -> None:
    for filesystem in (fs.LocalFileSystem(), fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("file")))):
        reader = RangeReader(filesystem, str(folder), retry=RetryPolicy(read_bytes=300))
        assert b"".join(reader.chunks("9.tar")) == (folder / "9.tar").read_bytes()
        assert reader.sizes() == {f"{i}.tar": 2000 + i for i in range(150)}
        with pytest.raises(FileNotFoundError):
            list(reader.chunks("none.tar"))
        with pytest.raises(FileNotFoundError):
            RangeReader(filesystem, f"{folder}/none").sizes()
        with pytest.raises(NotADirectoryError):
            list(RangeReader(filesystem, f"{folder}/9.tar").chunks("manifest.json"))


def test_what_arrived_is_not_asked_for_again() -> None:
    store = ScriptedStore(lambda data: data, lambda data: data[:400], fail(ConnectionResetError("reset")))
    reader = store.reader()
    assert reader.read("a.tar", 100, 2500, "v").to_pybytes() == CONTENT[100:2600]
    assert store.requests == [(100, 1100), (1100, 2100), (1500, 2500), (1500, 2500), (2500, 2600)]
    assert reader.retries == 1


@pytest.mark.parametrize(
    "fault",
    [
        fail(OSError("AWS Error SLOW_DOWN")),
        fail(TimeoutError()),
        fail(RuntimeError("a client library's own class")),
        lambda data: b"",
        lambda data: data + b"more",
    ],
)
def test_every_fault_is_survived_and_bounded(fault: Fault) -> None:
    assert ScriptedStore(fault, fault, fault).reader().read("a", 5, 50, "v").to_pybytes() == CONTENT[5:55]
    store = ScriptedStore(forever=fault)
    message = error_of(lambda: store.reader().read("train-000007.tar", 5, 50, "v"))
    assert "bucket/train-000007.tar, from byte 5 on, cannot be read: 4 requests failed" in message
    assert "Check the network" in message
    assert len(store.requests) == 4


def test_progress_makes_attempts_anew_but_not_the_deadline() -> None:
    drops = ScriptedStore(*[fail(OSError("x")), lambda data: data[:100]] * 20)
    assert drops.reader().read("a", 0, 2000, "v").to_pybytes() == CONTENT[:2000]
    slow = ScriptedStore(forever=lambda data: time.sleep(0.1) or data[:1])
    began = time.monotonic()
    policy = RetryPolicy(first_delay_seconds=0.001, deadline_seconds=0.5)
    assert "from byte 4 on" in error_of(lambda: slow.reader(policy).read("a", 0, 2000, "v"))
    assert 0.4 < time.monotonic() - began < 1.0


def test_no_pause_goes_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"paused for {seconds} s"))
    policy = RetryPolicy(first_delay_seconds=1e6, max_delay_seconds=1e6, deadline_seconds=1.0)
    store = ScriptedStore(fail(OSError("reset")))
    assert "1 requests failed" in error_of(lambda: store.reader(policy).read("a", 0, 9, "v"))


def test_a_stalled_request_is_abandoned() -> None:
    release = threading.Event()
    store = ScriptedStore(lambda data: data if release.wait(20) else b"")
    policy = RetryPolicy(first_delay_seconds=0.001, attempt_seconds=0.2)
    began = time.monotonic()
    assert store.reader(policy).read("a", 0, 9, "v").to_pybytes() == CONTENT[:9]
    assert 0.2 <= time.monotonic() - began < 2
    release.set()
    wait_for(lambda: all(thread.name != "range-request" for thread in threading.enumerate()), 5, "the abandoned thread")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError(errno.ENOENT, "gone"), "bucket/a.tar is not there"),
        (PermissionError(errno.EACCES, "no"), "Check the permissions"),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation"), "Check the permissions"),
    ],
)
def test_what_will_not_change_is_not_tried_again(error: OSError, expected: str) -> None:
    store = ScriptedStore(forever=fail(error))
    assert expected in error_of(lambda: store.reader().read("a.tar", 0, 9, "v"))
    assert len(store.requests) == 1


def test_delays_grow_are_random_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    policy = RetryPolicy(attempts=9, first_delay_seconds=1.0, max_delay_seconds=20.0, deadline_seconds=1e9)
    for _ in range(200):
        with pytest.raises(DataError):
            ScriptedStore(forever=lambda data: b"").reader(policy).read("a", 0, 1, "v")
    table = np.array(pauses).reshape(200, 8)
    bounds = np.array([1, 2, 4, 8, 16, 20, 20, 20])
    assert (table <= bounds).all()
    # Uniform on [0, bound]: mean bound / 2, whose standard error over 200 is bound * 0.0204.
    assert (abs(table.mean(axis=0) / bounds - 0.5) < 4 * 0.0204).all()


def test_each_retry_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "vae_dist.data.store.retry")
    ScriptedStore(*[fail(OSError("reset by peer"))] * 3).reader().read("a.tar", 0, 9, "v")
    assert [r.levelname for r in caplog.records] == ["WARNING", "DEBUG", "DEBUG"]
    assert all("bucket/a.tar, from byte 0 on" in m and "reset by peer" in m for m in caplog.messages)


def held_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file() and path.name != "ledger")


def test_cache_answers_instead_of_the_store(tmp_path: Path) -> None:
    store = ScriptedStore()
    reader = store.reader(cache=RangeCache(tmp_path / "cache", 2**20))
    for version, requests in (("v1", 1), ("v1", 1), ("v2", 2), ("v1", 2)):
        assert reader.read("a", 7, 500, version).to_pybytes() == CONTENT[7:507]
        assert len(store.requests) == requests
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert all(not p.stat().st_mode & 0o077 or p.is_file() for p in (tmp_path / "cache").rglob("*"))


def test_wrong_bytes_are_forgotten(tmp_path: Path) -> None:
    store = ScriptedStore(lambda data: b"\0" * len(data))
    reader = store.reader(cache=RangeCache(tmp_path, 2**20))
    assert reader.read("a", 0, 50, "v").to_pybytes() == b"\0" * 50
    assert reader.read("a", 0, 50, "v").to_pybytes() == b"\0" * 50
    reader.forget("a", 0, 50, "v")
    assert reader.read("a", 0, 50, "v").to_pybytes() == CONTENT[:50]
    assert len(store.requests) == 2
    reader.forget("a", 600, 50, "never read")


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"", lambda data: data + b"x"])
def test_a_cached_file_of_another_size_is_fetched_again(tmp_path: Path, change: Fault) -> None:
    store = ScriptedStore()
    reader = store.reader(cache=RangeCache(tmp_path, 2**20))
    reader.read("a", 0, 900, "v")
    [file] = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "ledger"]
    file.write_bytes(change(file.read_bytes()))
    for _ in range(2):
        assert reader.read("a", 0, 900, "v").to_pybytes() == CONTENT[:900]
    assert len(store.requests) == 2


def test_cache_keeps_its_bound_and_what_was_used_last(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 100 * 4096)
    for i in range(400):
        cache.put("v", i, CONTENT[: 1 + 13 * i])
        # Used all the time, so never out.
        assert cache.get("v", 0, 1) == CONTENT[:1]
        assert held_bytes(tmp_path) <= 100 * 4096
    kept = [i for i in range(1, 400) if cache.get("v", i, 1 + 13 * i) is not None]
    assert kept == list(range(kept[0], 400))
    assert held_bytes(tmp_path) > 80 * 4096
    cache.put("v", 1000, bytes(101 * 4096))
    assert cache.get("v", 1000, 101 * 4096) is None


def test_cache_finds_what_another_life_left(tmp_path: Path) -> None:
    first = RangeCache(tmp_path, 50 * 4096)
    for i in range(40):
        first.put("v", i, CONTENT[:4096])
    (tmp_path / "ledger").write_bytes(b"")
    dead = next(path for path in tmp_path.iterdir() if path.is_dir()) / "0123.77.tmp"
    dead.write_bytes(bytes(9 * 4096))
    second = RangeCache(tmp_path, 50 * 4096)
    assert second.get("v", 39, 4096) == CONTENT[:4096]
    for i in range(40, 80):
        second.put("v", i, CONTENT[:4096])
        assert held_bytes(tmp_path) <= 50 * 4096
    assert not dead.exists()


def test_a_full_disk_ends_caching_not_reading(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ScriptedStore()
    reader = store.reader(cache=RangeCache(tmp_path, 2**20))
    reader.read("a", 0, 50, "v")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel cuts writes off here as it does at the end of a disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        got = [reader.read("a", i, 9000, "v").to_pybytes() for i in (0, 1)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert got == [CONTENT[i : i + 9000] for i in (0, 1)]
    assert len([m for m in caplog.messages if "cannot be written" in m]) == 1
    assert not list(tmp_path.rglob("*.tmp"))
    before = len(store.requests)
    for offset, requests in ((0, 0), (2, 1), (2, 2)):
        assert reader.read("a", offset, 50, "v").to_pybytes() == CONTENT[offset : offset + 50]
        assert len(store.requests) - before == requests


def test_a_cache_that_cannot_be_read_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = RangeCache(tmp_path, 2**20)
    cache.put("v", 0, b"abc")
    [file] = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "ledger"]
    file.unlink()
    file.mkdir()
    for _ in range(2):
        assert ScriptedStore().reader(cache=cache).read("a", 0, 3, "v").to_pybytes() == CONTENT[:3]
    assert len([m for m in caplog.messages if "cannot be read" in m]) == 1


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 2**20)
    with ThreadPoolExecutor(1) as pool, open(tmp_path / "ledger") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        written = pool.submit(cache.put, "v", 0, b"abc")
        time.sleep(0.2)
        assert not written.done()
        assert cache.get("v", 0, 3) is None
        fcntl.flock(held, fcntl.LOCK_UN)
        written.result(10)
    assert cache.get("v", 0, 3) == b"abc"


def test_a_cache_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be used" in error_of(lambda: RangeCache(tmp_path / "file", 2**20))


def use_cache(directory: Path, seed: int, most: Any) -> None:
    """Many ranges of few, of sizes 1 to 9,000, through a cache that holds half of them."""
    reader = ScriptedStore().reader(cache=RangeCache(directory, 60 * 4096))
    for offset in np.random.default_rng(seed).integers(0, 100, 600):
        size = 1 + 89 * int(offset)
        assert reader.read("a", int(offset), size, "v").to_pybytes() == CONTENT[offset : offset + size]
        with most.get_lock():
            most.value = max(most.value, held_bytes_while_others_work(directory))


def held_bytes_while_others_work(directory: Path) -> int:
    total = 0
    for folder in directory.iterdir():
        for path in folder.iterdir() if folder.is_dir() else ():
            try:
                total += path.stat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def test_processes_share_a_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    most = context.Value("q", 0)
    workers = [context.Process(target=use_cache, args=(tmp_path, seed, most)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    # A listing is not a moment: a file may be counted and be gone when one that replaced it is counted.
    assert 20 * 4096 < most.value <= 1.2 * 60 * 4096
    assert held_bytes(tmp_path) <= 60 * 4096


def test_s3_options_come_from_url_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem, inner = resolve("s3://key:se%2Fcret@bucket/a/?scheme=http&endpoint_override=127.0.0.1:1&region=eu-x")
    _, (options,) = filesystem.__reduce__()
    assert inner == "bucket/a"
    found = {k: options[k] for k in ("access_key", "secret_key", "scheme", "endpoint_override", "region")}
    assert list(found.values()) == ["key", "se/cret", "http", "127.0.0.1:1", "eu-x"]
    assert options["connect_timeout"] == filesystem_module._CONNECT_SECONDS
    assert options["request_timeout"] == filesystem_module._SILENCE_SECONDS
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:2")
    _, (options,) = resolve("s3://bucket/a?region=eu-x")[0].__reduce__()
    assert options["endpoint_override"] == "http://127.0.0.1:2"
    assert options["access_key"] is None


def test_secrets_of_a_url_are_not_shown() -> None:
    message = error_of(lambda: resolve("nothing://user:secret@host/a"))
    assert "secret" not in message
    assert "nothing://***@host/a" in message
