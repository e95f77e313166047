"""Data sets in an S3-compatible object store, read through a proxy that breaks requests: every token, or an error."""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import FAULTS, FaultProxy, Schedule
from pyarrow import fs
from support import ROOT

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.store import dataset as module
from vae_dist.data.store import filesystem
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.filesystem import resolve
from vae_dist.data.store.range_cache import RangeCache
from vae_dist.data.store.ranges import RangeReader
from vae_dist.data.store.retry import RetryPolicy
from vae_dist.data.store.split import Split
from vae_dist.data.stream.order import OrderSpec
from vae_dist.data.stream.stream import Stream
from vae_dist.data.stream.windows import EpochWindows
from vae_dist.errors import DataError

BUCKET = "data"
PATIENT = RetryPolicy(first_delay_seconds=0.01, max_delay_seconds=0.1, attempt_seconds=1.5, deadline_seconds=30)
SHORT = RetryPolicy(
    attempts=4, first_delay_seconds=0.01, max_delay_seconds=0.1, attempt_seconds=1.5, deadline_seconds=3
)
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
READ_ALL = """
import hashlib, sys
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.ranges import RangeCache
split = Dataset.open(sys.argv[1]).split("train", cache=RangeCache(sys.argv[2], 2**24))
print(hashlib.sha256(split.read(0, split.sequences).tokens.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module", autouse=True)
def _client() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        # Less than a request may take, as it is by default: a connection that stalls is given back by the client.
        patch.setattr(filesystem, "_SILENCE_SECONDS", 1.0)
        yield


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 texts in about 45 members and a dozen shards."""
    folder = tmp_path_factory.mktemp("store")
    random = np.random.default_rng(3)
    lines = [f"n{i} " + " ".join(f"w{w}" for w in random.integers(0, 50, random.integers(1, 40))) for i in range(1200)]
    (folder / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    options = PrepareConfig(tokenizer="word", vocab_size=4096, member_sequences=25, shard_bytes=12_000)
    prepare(str(folder / "corpus.txt"), folder / "prepared", options)
    return folder / "prepared"


@pytest.fixture(scope="module")
def store(local: Path, s3_port: int) -> int:
    """Port of an S3 server that holds the data set."""
    upload(local, s3_port, "prepared")
    return s3_port


@pytest.fixture
def proxy(store: int) -> Iterator[FaultProxy]:
    with FaultProxy(store) as running:
        yield running


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> Callable[[RetryPolicy], None]:
    """Data sets opened from now on are read with this policy."""

    def use(policy: RetryPolicy) -> None:
        monkeypatch.setattr(module, "_OPENING", policy)
        monkeypatch.setattr(module, "_READING", policy)

    return use


def url(port: int, folder: str = "prepared") -> str:
    return f"s3://{BUCKET}/{folder}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"


def upload(local: Path, port: int, folder: str) -> fs.S3FileSystem:
    options = {"scheme": "http", "endpoint_override": f"127.0.0.1:{port}", "region": "us-east-1"}
    s3 = fs.S3FileSystem(**options, allow_bucket_creation=True)
    s3.create_dir(BUCKET)
    for path in local.iterdir():
        with s3.open_output_stream(f"{BUCKET}/{folder}/{path.name}") as out:
            out.write(path.read_bytes())
    return s3


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    return str(caught.value)


def runs(split: Split) -> list[tuple[int, int]]:
    """The split in runs of one member, so that a request is one member."""
    return [(i, min(25, split.sequences - i)) for i in range(0, split.sequences, 25)]


def assert_same(got: Split, truth: Split) -> None:
    ours, theirs = got.read_runs(runs(got)), truth.read(0, truth.sequences)
    np.testing.assert_array_equal(ours.offsets, theirs.offsets)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_token_arrives_through_each_fault(
    fault: str, proxy: FaultProxy, local: Path, tries: Callable[[RetryPolicy], None]
) -> None:
    tries(PATIENT)
    truth = Dataset.open(local).split("train")
    split = Dataset.open(url(proxy.port)).split("train")
    proxy.begin(Schedule((fault,), 1.0 if fault == "flip" else 0.25, only=".tar"))
    assert_same(split, truth)
    assert proxy.faults[fault] >= 5
    assert len(proxy.requests) >= len(runs(truth)) + proxy.faults[fault]


def test_opening_and_streaming_through_all_faults(
    proxy: FaultProxy,
    local: Path,
    tries: Callable[[RetryPolicy], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries(PATIENT)
    truth = Dataset.open(local)
    # All but wrong bytes, which the hashes of the small files would show and nothing would mend.
    passing = tuple(fault for fault in FAULTS if fault != "flip")
    met: Counter[str] = Counter()
    for seed in range(3):
        # The host's copies of the tables are kept in the temporary directory.
        (tmp_path / str(seed)).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / str(seed)))
        proxy.begin(Schedule(passing, 0.3, seed=seed))
        dataset = Dataset.open(url(proxy.port))
        assert dataset.manifest_hash == truth.manifest_hash
        met += proxy.faults
    assert met.total() >= 6
    quick = tuple(fault for fault in FAULTS if fault not in ("stall", "trickle"))
    proxy.begin(Schedule(quick, 0.3, only=".tar", seed=2))
    spec = OrderSpec(
        sequences=truth.split("train").sequences, manifest_hash=truth.manifest_hash, seed=5, streams=4,
        batch_sequences=32, length_groups=5, block_sequences=25, window_sequences=100,
    )  # fmt: skip
    ours, theirs = (Stream([d.split("train")], EpochWindows(spec), 0, 1) for d in (dataset, truth))
    for step in range(spec.steps_per_epoch):
        got, wanted = ours.share(step), theirs.share(step)
        assert [row.tolist() for row in got.sequences] == [row.tolist() for row in wanted.sequences]
    assert len(proxy.faults) >= 4
    assert proxy.faults.total() >= 8


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "flip"])
def test_a_fault_that_stays_ends_in_an_error(
    fault: str, proxy: FaultProxy, tries: Callable[[RetryPolicy], None]
) -> None:
    tries(SHORT)
    split = Dataset.open(url(proxy.port)).split("train")
    proxy.begin(Schedule((fault,), 1.0))
    began = time.monotonic()
    message = error_of(lambda: split.read(0, 25))
    assert time.monotonic() - began < SHORT.deadline_seconds + 1
    assert f"{BUCKET}/prepared/train-000000.tar, from byte " in message
    assert "requests failed" in message
    assert "Check the network" in message


def test_a_store_that_is_gone(store: int, tries: Callable[[RetryPolicy], None]) -> None:
    tries(SHORT)
    with FaultProxy(store) as proxy:
        split = Dataset.open(url(proxy.port)).split("train")
    message = error_of(lambda: split.read(0, 25))
    assert "train-000000.tar" in message
    assert "connect" in message.lower()
    assert "cannot be" in error_of(lambda: Dataset.open(url(proxy.port)))


def test_denied_is_not_tried_again(proxy: FaultProxy, tries: Callable[[RetryPolicy], None]) -> None:
    tries(PATIENT)
    split = Dataset.open(url(proxy.port)).split("train")
    proxy.begin(Schedule(("denied",), 1.0))
    message = error_of(lambda: split.read(0, 25))
    assert "train-000000.tar" in message
    assert "Check the permissions, the credentials and the address" in message
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("is_known", [False, True], ids=["never read", "read before"])
def test_a_deleted_shard_is_named_at_once(
    is_known: bool, local: Path, store: int, tries: Callable[[RetryPolicy], None]
) -> None:
    tries(PATIENT)
    s3 = upload(local, store, "deleted")
    split = Dataset.open(url(store, "deleted")).split("train")
    if is_known:
        split.read(0, 1)
    s3.delete_file(f"{BUCKET}/deleted/train-000000.tar")
    began = time.monotonic()
    # The members first read are remembered, the second run of the shard is not.
    assert f"{BUCKET}/deleted/train-000000.tar is not there" in error_of(lambda: split.read(25, 25))
    assert time.monotonic() - began < 2
    assert "train-000000.tar" in error_of(lambda: Dataset.open(url(store, "deleted")))


def test_no_byte_that_arrived_is_fetched_twice(proxy: FaultProxy, local: Path) -> None:
    s3, inner = resolve(url(proxy.port), store_attempts=1)
    policy = RetryPolicy(first_delay_seconds=0.001, max_delay_seconds=0.01, read_bytes=700)
    reader = RangeReader(s3, inner, retry=policy)
    name = sorted(path.name for path in local.glob("train-*.tar"))[0]
    size = (local / name).stat().st_size
    proxy.begin(Schedule(("reset_in_body", "truncate", "slow_down", "reset_before"), 0.4, seed=4))
    assert reader.read(name, 100, size - 150, "v").to_pybytes() == (local / name).read_bytes()[100 : size - 50]
    asked = [request for request in proxy.requests if request.method == "GET"]
    arrived = sorted(request.span for request in asked if request.fault is None)
    assert arrived == [(first, min(first + 699, size - 51)) for first in range(100, size - 50, 700)]
    # Only what broke off is asked for again, and it is asked for again each time.
    broken = Counter(request.span for request in asked if request.fault)
    assert sum(broken.values()) >= 4
    assert Counter(request.span for request in asked) == broken + Counter(arrived)


def test_how_often_the_client_asks_by_itself(proxy: FaultProxy) -> None:
    proxy.begin(Schedule(("reset_before",), 1.0))
    for attempts, requests in ((1, 1), (3, 3)):
        s3, inner = resolve(url(proxy.port), store_attempts=attempts)
        with pytest.raises(OSError):
            s3.get_file_info(f"{inner}/manifest.json")
        assert len(proxy.requests) == requests
        proxy.begin(proxy.schedule)


def shard_requests(proxy: FaultProxy) -> int:
    return sum(request.path.endswith(".tar") for request in proxy.requests)


def ranges_on_disk(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and path.name != "ledger"]


def test_the_second_pass_asks_for_nothing(proxy: FaultProxy, local: Path, tmp_path: Path) -> None:
    truth, dataset = Dataset.open(local).split("train"), Dataset.open(url(proxy.port))
    assert_same(dataset.split("train", cache=RangeCache(tmp_path, 2**24)), truth)
    proxy.begin(Schedule())
    assert_same(dataset.split("train", cache=RangeCache(tmp_path, 2**24)), truth)
    assert shard_requests(proxy) == 0


def test_a_small_cache_keeps_its_bound(proxy: FaultProxy, local: Path, tmp_path: Path) -> None:
    truth, dataset = Dataset.open(local).split("train"), Dataset.open(url(proxy.port))
    for _ in range(2):
        assert_same(dataset.split("train", cache=RangeCache(tmp_path, 20 * 4096)), truth)
        assert 0 < sum(path.stat().st_blocks * 512 for path in ranges_on_disk(tmp_path)) <= 20 * 4096


def test_flipped_bits_in_the_cache_are_fetched_again(proxy: FaultProxy, local: Path, tmp_path: Path) -> None:
    truth, dataset = Dataset.open(local).split("train"), Dataset.open(url(proxy.port))
    assert_same(dataset.split("train", cache=RangeCache(tmp_path, 2**24)), truth)
    damaged = ranges_on_disk(tmp_path)[::3]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    proxy.begin(Schedule())
    assert_same(dataset.split("train", cache=RangeCache(tmp_path, 2**24)), truth)
    assert sum(r.method == "GET" and r.path.endswith(".tar") for r in proxy.requests) == len(damaged) > 10
    proxy.begin(Schedule())
    assert_same(dataset.split("train", cache=RangeCache(tmp_path, 2**24)), truth)
    assert shard_requests(proxy) == 0


def test_processes_share_a_cache_through_faults(proxy: FaultProxy, local: Path, tmp_path: Path) -> None:
    proxy.begin(Schedule(("reset_in_body", "slow_down", "truncate"), 0.2, only=".tar", seed=5))
    command = [sys.executable, "-c", READ_ALL, url(proxy.port), str(tmp_path)]
    first = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in first]
    assert proxy.faults.total() > 0
    proxy.begin(Schedule())
    said.append(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout)
    assert shard_requests(proxy) == 0
    local_command = [*command[:3], str(local), str(tmp_path / "unused")]
    said.append(subprocess.run(local_command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60).stdout)
    assert len(said[0].strip()) == 64
    assert len(set(said)) == 1
