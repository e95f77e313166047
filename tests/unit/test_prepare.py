"""Preparing data: counts, splits, the length policy, reproducible bytes, interruption, and the PTB numbers."""

import json
import logging
import os
import shutil
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare import encode, making
from vae_dist.data.prepare.lengths import fit_lengths
from vae_dist.data.prepare.prepare import prepare, prepare_cached
from vae_dist.data.source import lines
from vae_dist.data.source.sources import split_of
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.store.split import Split
from vae_dist.errors import DataError, MachineError

ROOT = Path(__file__).resolve().parents[2]
ONLY_TRAIN = {"valid_fraction": 0.0, "test_fraction": 0.0}


def word(**options: Any) -> PrepareConfig:
    """Options of a word-level data set, whatever the defaults are."""
    return PrepareConfig(**{"tokenizer": "word", "vocab_size": 10_000, "max_tokens": 128, **options})


def corpus(folder: Path, lines: list[str], name: str = "corpus.txt") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def texts(dataset: Dataset, split: Split) -> list[str]:
    return [dataset.tokenizer.decode(ids) for ids in split.read(0, split.sequences)]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def numbered(count: int) -> list[str]:
    return [f"text n{i} of many" for i in range(count)]


@given(
    lines=st.lists(st.text(st.sampled_from("ab é\U0001f600</s>"), max_size=30), min_size=1, max_size=40),
    member=st.integers(1, 9),
    shard=st.sampled_from([4096, 8192, 1 << 20]),
    bpe=st.booleans(),
    ranges=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    member: int,
    shard: int,
    bpe: bool,
    ranges: list[tuple[int, int]],
) -> None:
    """Every text comes back, in the order of the source, for any range, member size and shard size."""
    folder = tmp_path_factory.mktemp("round")
    kept = [line.strip() for line in lines if line.strip()]
    # A word-level vocabulary has no words for the special tokens, which is tested elsewhere.
    kept = kept if bpe else [line.replace("<", "x").replace(">", "y") for line in kept]
    options = word(
        tokenizer="bpe" if bpe else "word", vocab_size=300, member_sequences=member, shard_bytes=shard, **ONLY_TRAIN
    )
    source = corpus(folder, kept)
    if not kept:
        with pytest.raises(DataError, match="gives no training sequence"):
            prepare(source, folder / "out", options)
        return
    dataset = prepare(source, folder / "out", options)
    split = dataset.split("train")
    expected = kept if bpe else [" ".join(text.split()) for text in kept]
    assert texts(dataset, split) == expected
    for first, count in ranges:
        first = min(first, len(kept))
        count = min(count, len(kept) - first)
        assert [dataset.tokenizer.decode(ids) for ids in split.read(first, count)] == expected[first : first + count]


def test_source_splits_are_kept(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        corpus(tmp_path / "in", [f"{name} {i} unseen{name}{i}" for i in range(20)], f"{name}.txt")
    dataset = prepare(str(tmp_path / "in"), tmp_path / "out", word())
    assert dataset.splits == ["train", "valid", "test"]
    assert texts(dataset, dataset.split("train"))[3] == "train 3 unseentrain3"
    # The vocabulary knows the training split only.
    assert texts(dataset, dataset.split("valid"))[3] == "<unk> 3 <unk>"
    assert dataset.manifest["splits"]["valid"]["unknown_tokens"] == 40
    assert dataset.manifest["splits"]["train"]["unknown_tokens"] == 0


def test_split_by_hash(tmp_path: Path) -> None:
    lines = numbered(4000)
    options = word(valid_fraction=0.2, test_fraction=0.1)
    dataset = prepare(corpus(tmp_path, lines), tmp_path / "out", options)
    sizes = [dataset.split(name).sequences for name in ("train", "valid", "test")]
    assert sum(sizes) == 4000
    # Five standard deviations of a binomial.
    for size, share in zip(sizes, (0.7, 0.2, 0.1), strict=True):
        assert abs(size - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5
    assert sizes[1] == sum(split_of(line, options) == "valid" for line in lines)
    # Where a text goes depends on the text alone.
    reordered = prepare(corpus(tmp_path / "b", [*lines[::-1], "one more"]), tmp_path / "b" / "out", options)
    assert abs(reordered.split("test").sequences - sizes[2]) <= 1


def test_equal_texts_after_lower_casing_share_a_split_and_are_duplicates(tmp_path: Path) -> None:
    lines = [f(line) for line in numbered(300) for f in (str.title, str.lower, str.upper)]
    options = word(valid_fraction=0.3, test_fraction=0.3, lowercase=True, deduplicate="exact")
    dataset = prepare(corpus(tmp_path, lines), tmp_path / "out", options)
    assert sum(dataset.split(name).sequences for name in dataset.splits) == 300
    assert dataset.manifest["duplicate_texts"] == 600
    kept = prepare(corpus(tmp_path, lines), tmp_path / "kept", options.model_copy(update={"deduplicate": "none"}))
    for name in kept.splits:
        assert kept.split(name).sequences == 3 * dataset.split(name).sequences
    assert "text" in texts(kept, kept.split("train"))[0]


def test_duplicates_across_splits(tmp_path: Path) -> None:
    corpus(tmp_path / "in", ["a b", "c d", "a b"], "test.txt")
    corpus(tmp_path / "in", ["c d", "e f", "g h"], "train.txt")
    dataset = prepare(str(tmp_path / "in"), tmp_path / "out", word(deduplicate="exact"))
    # Files are read in order of their names: what is tested on is not trained on.
    assert texts(dataset, dataset.split("train")) == ["e f", "g h"]
    assert dataset.manifest["duplicate_texts"] == 2
    assert dataset.manifest["splits"]["test"]["unknown_tokens"] == 4


def fit_length(ids: list[int], max_tokens: int, policy: str) -> list[list[int]]:
    """The length policy as one would write it down for a single text."""
    if len(ids) <= max_tokens:
        return [ids]
    body, size = ids[:-1], max_tokens - 1
    starts = range(0, len(body), size)
    return {
        "truncate": [[*body[:size], 2]],
        "drop": [],
        "split": [[*body[start : start + size], 2] for start in starts],
    }[policy]


@given(
    rows=st.lists(st.lists(st.integers(3, 99), max_size=12), max_size=8),
    max_tokens=st.integers(2, 9),
    policy=st.sampled_from(["truncate", "drop", "split"]),
)
def test_length_policy(rows: list[list[int]], max_tokens: int, policy: str) -> None:
    encoded = Sequences.from_list([np.array([*row, 2], dtype=np.uint32) for row in rows])
    fitted, numbers = fit_lengths(encoded, max_tokens, policy)
    expected = [(n, piece) for n, row in enumerate(rows) for piece in fit_length([*row, 2], max_tokens, policy)]
    assert [(int(n), piece.tolist()) for n, piece in zip(numbers, fitted, strict=True)] == expected


@pytest.mark.parametrize(
    ("policy", "sequences", "count"), [("truncate", 10, "truncated"), ("drop", 6, "dropped"), ("split", 14, "split")]
)
def test_length_policy_is_counted(tmp_path: Path, policy: str, sequences: int, count: str) -> None:
    lines = [" ".join(f"w{i}" for i in range(5 if n % 5 < 2 else 3)) for n in range(10)]
    options = word(max_tokens=4, too_long=policy, **ONLY_TRAIN)
    dataset = prepare(corpus(tmp_path, lines), tmp_path / "out", options)
    facts = dataset.manifest["splits"]["train"]
    assert facts["sequences"] == sequences
    assert {key: facts[key] for key in ("truncated", "dropped", "split")} == {
        key: 4 if key == count else 0 for key in ("truncated", "dropped", "split")
    }
    assert facts["max_tokens"] == 4
    assert all(row[-1] == 2 for row in dataset.split("train").read(0, sequences))
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        docs = pa.ipc.open_stream(tar.extractfile(tar.next()).read()).read_all().column("doc").to_pylist()
    expected = {"truncate": range(10), "drop": [2, 3, 4, 7, 8, 9], "split": [0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 6, 7, 8, 9]}
    assert docs == list(expected[policy])


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    dataset = prepare(corpus(tmp_path, ["one", "", "  ", "two"]), tmp_path / "out", word(**ONLY_TRAIN))
    assert dataset.manifest["empty_texts"] == 2
    assert dataset.split("train").sequences == 2


@pytest.mark.parametrize("tokenizer", ["word", "bpe"])
def test_reruns_are_byte_identical(tmp_path: Path, tokenizer: str) -> None:
    options = word(tokenizer=tokenizer, vocab_size=400, member_sequences=50, shard_bytes=8192)
    source = corpus(tmp_path / "a", numbered(2000))
    first = prepare(source, tmp_path / "one", options)
    second = prepare(source, tmp_path / "two", options)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    # Elsewhere, and written at another time, the same text is the same data set but for origin.json.
    copy = corpus(tmp_path / "b", numbered(2000))
    os.utime(copy, (1, 1))
    third = prepare(copy, tmp_path / "three", options)
    assert first.manifest_hash == second.manifest_hash == third.manifest_hash
    one, three = files(tmp_path / "one"), files(tmp_path / "three")
    assert one.pop("origin.json") != three.pop("origin.json")
    assert one == three
    assert not [name for name in one if name.startswith(".") or name.endswith("tmp")]


def test_batches_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path, numbered(100))
    prepare(source, tmp_path / "one", word())
    monkeypatch.setattr(lines, "_READ_BYTES", 50)
    monkeypatch.setattr(encode, "_ENCODED_AT_ONCE", 3)
    monkeypatch.setattr(encode, "_BLOCK_TOKENS", 40)
    prepare(source, tmp_path / "two", word())
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_finished_data_set_is_not_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = corpus(tmp_path, numbered(50))
    with caplog.at_level(logging.INFO):
        first = prepare(source, tmp_path / "out", word())
        assert "train: " in caplog.text
        assert "% unknown" in caplog.text
        assert "prepared already" not in caplog.text
        stamp = (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns
        second = prepare(source, tmp_path / "out", word())
    assert f"{tmp_path / 'out'} is prepared already" in caplog.text
    assert second.manifest_hash == first.manifest_hash
    assert (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns == stamp


def test_another_data_set_is_not_overwritten(tmp_path: Path) -> None:
    source = corpus(tmp_path, numbered(50))
    prepare(source, tmp_path / "out", word())
    before = files(tmp_path / "out")

    def refused(source: str, **options: Any) -> str:
        with pytest.raises(DataError, match="holds another data set") as caught:
            prepare(source, tmp_path / "out", word(**options))
        assert files(tmp_path / "out") == before
        return str(caught.value)

    assert "its options differ" in refused(source, lowercase=True)
    assert "its source and fingerprint differ" in refused(corpus(tmp_path / "b", numbered(50)))
    corpus(tmp_path, numbered(51))
    message = refused(source)
    assert "its fingerprint differ" in message
    assert f"made of {source}" in message


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """A folder of tars that looks like ours, but was never marked by us, is not emptied."""
    source = corpus(tmp_path, numbered(50))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match="not empty and holds no data set"):
        prepare(source, tmp_path / "out", word())
    assert files(tmp_path / "out") == {"train-000000.tar": b"precious"}
    with pytest.raises(DataError, match="cannot be written"):
        prepare(source, Path(source), word())
    (tmp_path / "empty").mkdir()
    assert prepare(source, tmp_path / "empty", word()).splits


def test_no_text_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gives no training sequence: 0 texts"):
        prepare(corpus(tmp_path, ["", " "]), tmp_path / "out", word())
    assert not (tmp_path / "out" / "manifest.json").exists()
    message = r"gives no training sequence: 50 texts were read, 50 of them longer than prepare\.max_tokens"
    with pytest.raises(DataError, match=message):
        prepare(corpus(tmp_path, numbered(50)), tmp_path / "out", word(max_tokens=2, too_long="drop"))
    with pytest.raises(DataError, match="gives no training sequence: 50 texts"):
        prepare(corpus(tmp_path, numbered(50)), tmp_path / "out", word(test_fraction=1.0))
    # A failure leaves nothing in the way of the next try.
    assert prepare(corpus(tmp_path, numbered(50)), tmp_path / "out", word()).splits


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(making, "write_tables", full)
    with pytest.raises(MachineError, match="No space left on device"):
        prepare(corpus(tmp_path, numbered(50)), tmp_path / "out", word())


def test_two_at_once_make_one_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path, numbered(200))
    original, written, hashes = making.Making.write, [], []

    def slow(*arguments: Any) -> None:
        written.append(1)
        time.sleep(0.3)
        original(*arguments)

    monkeypatch.setattr(making.Making, "write", slow)
    target = tmp_path / "out"
    work = [
        threading.Thread(target=lambda: hashes.append(prepare(source, target, word()).manifest_hash)) for _ in range(3)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(written) == 1
    assert len(hashes) == 3
    assert len(set(hashes)) == 1


def test_prepare_cached(tmp_path: Path) -> None:
    source = corpus(tmp_path, numbered(50))
    first, path = prepare_cached(source, word(), tmp_path / "data")
    again, same = prepare_cached(source, word(), tmp_path / "data")
    assert (same, again.manifest_hash) == (path, first.manifest_hash)
    assert path.name.startswith("corpus.txt-")
    _, other = prepare_cached(source, word(lowercase=True), tmp_path / "data")
    assert other != path
    # A file that was moved is another source, and not in the way of the first.
    shutil.move(source, tmp_path / "b.txt")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    assert prepare_cached(str(tmp_path / "b.txt"), word(), tmp_path / "data")[1] not in (path, other)


def test_a_given_tokenizer_is_part_of_what_the_data_set_is(tmp_path: Path) -> None:
    source = corpus(tmp_path, numbered(50))
    first = prepare(source, tmp_path / "one", word())
    first.tokenizer.save(tmp_path / "t.json")
    options = word(tokenizer=str(tmp_path / "t.json"))
    second = prepare(source, tmp_path / "two", options)
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    assert (tmp_path / "two" / "train-000000.tar").read_bytes() == (tmp_path / "one" / "train-000000.tar").read_bytes()
    assert second.manifest["options"]["tokenizer"] == "t.json"
    other = prepare(corpus(tmp_path / "b", ["other words"] * 20), tmp_path / "three", word(**ONLY_TRAIN))
    other.tokenizer.save(tmp_path / "t.json")
    with pytest.raises(DataError, match="its options differ"):
        prepare(source, tmp_path / "two", options)


def test_manifest_holds_what_is_promised(tmp_path: Path) -> None:
    options = word(max_tokens=9)
    prepare(corpus(tmp_path, numbered(500)), tmp_path / "out", options)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["format_version"] == 2
    assert manifest["dtype"] == "uint16"
    assert manifest["options"] == options.model_dump(mode="json")
    size = (tmp_path / "corpus.txt").stat().st_size
    assert manifest["source"] == {"name": "corpus.txt", "files": [["corpus.txt", size]]}
    assert sum(split["texts"] for split in manifest["splits"].values()) == 500
    # No path, host or time: they would make equal data sets differ.
    assert str(tmp_path) not in json.dumps(manifest)


def test_ptb_counts(ptb: Path, tmp_path: Path) -> None:
    """The published sizes of the benchmark: tokens count one end of sequence a line."""
    dataset = prepare(str(ptb), tmp_path / "out", word(vocab_size=20_000))
    counts = {name: (dataset.split(name).sequences, dataset.split(name).tokens) for name in dataset.splits}
    assert counts == {"train": (42_068, 929_589), "valid": (3_370, 73_760), "test": (3_761, 82_430)}
    # 9,999 words, of which <unk> is one of the four special tokens.
    assert dataset.tokenizer.vocab_size == 9_999 - 1 + 4
    lines = (ptb / "test.txt").read_text(encoding="utf-8").split("\n")
    unknown = sum(line.split().count("<unk>") for line in lines)
    facts = dataset.manifest["splits"]["test"]
    assert facts["unknown_tokens"] == unknown
    assert facts["truncated"] == 0
    stored = texts(dataset, dataset.split("test"))
    assert stored == [" ".join(line.split()) for line in lines if line.strip()]
