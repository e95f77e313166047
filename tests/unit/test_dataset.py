"""Opening a data set directory and reading ranges: values against the rows written, and every kind of damage."""

import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xxhash

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.store import split as module
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.info import describe, length_histogram, preview, render_info
from vae_dist.data.text.tokenizer import Tokenizer, build_tokenizer
from vae_dist.errors import DataError

OPTIONS = PrepareConfig(tokenizer="word", member_sequences=7, shard_bytes=4096, valid_fraction=0.1, test_fraction=0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """400 numbered texts of 1 to 21 words, in many members and shards."""
    lines = [" ".join([f"n{i}", *["word"] * (i % 21)]) for i in range(400)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    prepare(str(tmp_path / "corpus.txt"), tmp_path / "data", OPTIONS)
    return tmp_path / "data"


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    return str(caught.value)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def test_every_range_reads_the_same_rows(folder: Path) -> None:
    split = Dataset.open(folder).split("train")
    whole = [split.read(i, 1)[0].tolist() for i in range(split.sequences)]
    assert split.tokens == sum(map(len, whole))
    assert split.max_tokens == max(map(len, whole))
    for first in range(0, split.sequences, 13):
        for count in (0, 1, 6, 7, 8, 100):
            count = min(count, split.sequences - first)
            part = split.read(first, count)
            assert [row.tolist() for row in part] == whole[first : first + count]
            assert part.lengths.tolist() == [len(row) for row in whole[first : first + count]]


def test_reading_outside_is_an_error(folder: Path) -> None:
    split = Dataset.open(folder).split("train")
    for first, count in ((-1, 1), (0, -1), (split.sequences, 1), (0, split.sequences + 1)):
        with pytest.raises(IndexError):
            split.read(first, count)


def test_cache_is_bounded_and_correct(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Dataset.open(folder).split("train")
    expected = [row.tolist() for row in split.read(0, split.sequences)]
    monkeypatch.setattr(module, "_CACHED_BYTES", 1000)
    small = Dataset.open(folder).split("train")
    for i in np.random.default_rng(0).integers(0, small.sequences, 500):
        assert small.read(int(i), 1)[0].tolist() == expected[i]
        held = sum(s.tokens.nbytes + s.offsets.nbytes for s in small._cache.values())
        assert held == small._cached_bytes
        assert held <= 1000 or len(small._cache) == 1


def test_reading_one_sequence_reads_one_member(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Dataset.open(folder).split("train")
    members: list[int] = []
    original = split._load
    monkeypatch.setattr(split, "_load", lambda numbers: members.extend(numbers) or original(numbers))
    split.read(100, 1)
    split.read(101, 1)
    assert members == [100 // 7]


def test_threads_share_a_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHED_BYTES", 1000)
    split = Dataset.open(folder).split("train")
    expected = [row.tolist() for row in split.read(0, split.sequences)]
    wrong: list[int] = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, split.sequences, 300):
            if split.read(int(i), 1)[0].tolist() != expected[i]:
                wrong.append(int(i))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_urls_read_like_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = Dataset.open(folder)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/sets/one", recursive=True)
    for url in (f"file://{folder}", "memory://sets/one"):
        remote = Dataset.open(url)
        assert remote.manifest_hash == local.manifest_hash
        for name in local.splits:
            count = local.split(name).sequences
            assert remote.split(name).read(0, count).tokens.tolist() == local.split(name).read(0, count).tokens.tolist()
    # A copy of the index stays on this host and is known by its hash: only another host misses the file.
    memory.rm("/sets/one/index.arrow")
    assert Dataset.open("memory://sets/one").manifest_hash == local.manifest_hash
    monkeypatch.setattr(tempfile, "tempdir", str(folder.parent))
    assert "index.arrow is not the one" in error_of(lambda: Dataset.open("memory://sets/one"))
    assert "no data set directory memory://nowhere" in error_of(lambda: Dataset.open("memory://nowhere"))


def test_missing_directory_and_manifest(folder: Path, tmp_path: Path) -> None:
    assert "no data set directory" in error_of(lambda: Dataset.open(tmp_path / "nowhere"))
    (folder / "manifest.json").unlink()
    message = error_of(lambda: Dataset.open(folder))
    assert "has no manifest.json" in message
    assert "interrupted" in message
    assert "vae-dist data prepare" in message
    assert "has no manifest.json" in error_of(lambda: Dataset.open(tmp_path / "corpus.txt"))


def test_unreadable_manifest(folder: Path) -> None:
    edit_manifest(folder, format_version=99)
    assert "format version 99; this vae_dist reads version 2" in error_of(lambda: Dataset.open(folder))
    (folder / "manifest.json").write_text('{"format_version": 2}')
    assert "lacks tokenizer_sha256, vocab_size, splits" in error_of(lambda: Dataset.open(folder))
    for content in ("", "{", "[]", '{"a": 1}', "\0"):
        (folder / "manifest.json").write_text(content)
        assert "manifest.json is not readable" in error_of(lambda: Dataset.open(folder))


@pytest.mark.parametrize("name", ["index.arrow", "shards.arrow"])
def test_damaged_tables(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert f"{name} is not the one that the manifest names" in error_of(lambda: Dataset.open(folder))
    (folder / name).unlink()
    assert f"{name} is not the one that the manifest names" in error_of(lambda: Dataset.open(folder))


def test_another_tokenizer(folder: Path) -> None:
    build_tokenizer(["other words"], OPTIONS).save(folder / "tokenizer.json")
    assert "was prepared with another tokenizer" in error_of(lambda: Dataset.open(folder))
    (folder / "tokenizer.json").unlink()
    assert "There is no tokenizer" in error_of(lambda: Dataset.open(folder))


def test_missing_and_truncated_shard(folder: Path) -> None:
    shard = folder / "train-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    message = error_of(lambda: Dataset.open(folder))
    assert f"train-000001.tar has {len(data) - 512} bytes, but {len(data)} were written" in message
    shard.unlink()
    assert "lacks the shard train-000001.tar" in error_of(lambda: Dataset.open(folder))


def test_flipped_byte_is_found_when_it_is_read(folder: Path) -> None:
    dataset = Dataset.open(folder)
    column = {c: dataset.index.column(c).to_pylist() for c in ("split", "shard", "offset", "bytes", "first_sequence")}
    row = next(i for i, s in enumerate(column["split"]) if s == "train" and column["shard"][i] == 1)
    shard = folder / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[column["offset"][row] + column["bytes"][row] // 2] ^= 1
    shard.write_bytes(data)
    split = Dataset.open(folder).split("train")
    assert len(split.read(0, column["first_sequence"][row])) == column["first_sequence"][row]
    message = error_of(lambda: split.read(column["first_sequence"][row], 1))
    assert f"{shard}, member {row} of split train at byte {column['offset'][row]}, is damaged" in message
    shard.unlink()
    message = error_of(lambda: split.read(column["first_sequence"][row], 1))
    assert f"member {row} of split train at byte {column['offset'][row]}, is out of reach" in message


def test_unknown_split(folder: Path) -> None:
    assert "has no split 'test'; it has train, valid." in error_of(lambda: Dataset.open(folder).split("test"))


def test_hashes(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert dataset.manifest["index_xxh3"] == xxhash.xxh3_128_hexdigest((folder / "index.arrow").read_bytes())
    assert dataset.tokenizer.sha256 == Tokenizer.load(folder / "tokenizer.json").sha256
    edit_manifest(folder, anything=1)
    assert Dataset.open(folder).manifest_hash != dataset.manifest_hash


def test_info(folder: Path) -> None:
    dataset = Dataset.open(folder)
    facts = json.loads(json.dumps(describe(dataset)))
    for name in dataset.splits:
        lengths = dataset.split(name).read(0, dataset.split(name).sequences).lengths
        split = facts["splits"][name]
        assert split["sequences"] == len(lengths)
        assert split["mean_tokens"] == pytest.approx(lengths.mean())
        exact = {str(p): np.quantile(lengths, p / 100, method="inverted_cdf") for p in (5, 50, 95)}
        assert split["length_percentiles"] == exact
        histogram = split["length_histogram"]
        edges = np.arange(len(histogram["counts"]) + 1) * histogram["bin_tokens"] + 0.5
        assert histogram["counts"] == np.histogram(lengths, edges)[0].tolist()
        assert sum(histogram["counts"]) == len(lengths)
        assert split["bytes"] == sum(p.stat().st_size for p in folder.glob(f"{name}-*.tar"))
    table = render_info(facts)
    assert f"{facts['splits']['train']['tokens']:,}" in table
    assert length_histogram(dataset, "train") in table
    longest = max(histogram["counts"])
    assert next(line for line in table.splitlines() if line.endswith("█" * 40)).split()[1] == f"{longest:,}" or longest


def test_preview(folder: Path) -> None:
    dataset = Dataset.open(folder)
    count = dataset.split("valid").sequences
    texts = preview(dataset, "valid", 0, 10_000)
    assert len(texts) == count
    assert preview(dataset, "valid", 2, 3) == texts[2:5]
    assert preview(dataset, "valid", count - 1, 3) == texts[-1:]
    assert f"no sequence {count}. Choose one from 0 to {count - 1}" in error_of(
        lambda: preview(dataset, "valid", count, 1)
    )
    assert "no sequence -1" in error_of(lambda: preview(dataset, "valid", -1, 1))
