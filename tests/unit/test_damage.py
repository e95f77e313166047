"""Every kind of damage is found twice: by `data lint`, and by the stream before a wrong token is trained on."""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import webdataset
from small_data import all_rows, change_member, entries_of, some_rows, word_tokenizer, write_dataset

from vae_dist.config.schema import Config
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.lint import lint
from vae_dist.data.store.range_cache import RangeCache
from vae_dist.data.store.shards import MemberEntry
from vae_dist.data.stream.training_data import TrainingData, open_training_data
from vae_dist.errors import DataError

# The second of the three members of the third of six shards.
MEMBER = 7
ROWS = {"train": some_rows(120, 0), "valid": some_rows(20, 1)}
STEPS = 15


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clean") / "data", ROWS)


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "data"))


def config(**data: object) -> Config:
    return Config.model_validate({"data": {"streams": 4, **data}, "train": {"batch_sequences": 8}})


class Epoch(NamedTuple):
    """An epoch over all ranks: its sequences, B_real of every step of every rank, and how many were left out."""

    seen: Counter[tuple[int, ...]]
    real: list[int]
    skipped: int


def epoch(data: TrainingData, world_size: int = 1) -> Epoch:
    seen: Counter[tuple[int, ...]] = Counter()
    real, skipped = [], 0
    for rank in range(world_size):
        stream = data.stream(rank, world_size)
        for share in stream.shares(0, STEPS):
            seen.update(tuple(row.tolist()) for row in share.sequences)
            real.append(share.real_sequences)
        skipped += stream.skipped_sequences
    return Epoch(seen, real, skipped)


def stream_error(folder: Path) -> str:
    """What the training stream says of a data set of which the driver has not looked at the shards."""
    with pytest.raises(DataError) as caught:
        epoch(open_training_data([str(folder)], config(), workers=1))
    return caught.value.message


def read_error(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        all_rows(folder)
    return caught.value.message


def assert_found(folder: Path, whats: str, lost: tuple[int, ...] = (MEMBER,)) -> None:
    """Lint names shard, member and byte of every lost member; the stream and plain reading those of one of them."""
    entries, shards = entries_of(folder)
    problems = lint(folder)["problems"]
    for number in lost:
        where = (shards[entries[number].shard].name, number, entries[number].offset)
        found = [p["what"] for p in problems if (p["shard"], p["member"], p["offset"]) == where]
        assert any(whats in what for what in found), problems
    places = [
        f"{folder}/{shards[entries[n].shard].name}, member {n} of split train at byte {entries[n].offset},"
        for n in lost
    ]
    assert any(place in stream_error(folder) for place in places)
    # Read in order, the first is the one that is named.
    assert places[0] in read_error(folder)


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def token_place(data: bytes, entry: MemberEntry) -> int:
    """The lowest byte of the member's first token but one."""
    tokens = np.concatenate(ROWS["train"][entry.first_sequence : entry.first_sequence + entry.sequences])
    place = data.find(tokens.astype("<u2").tobytes(), entry.offset)
    assert place > 0
    return place + 2


TAR_DAMAGE: dict[str, Callable[[bytes, MemberEntry], bytes]] = {
    "a byte of a header flipped": lambda data, e: flip(data, e.offset + 3),
    "a header zeroed": lambda data, e: data[: e.offset] + bytes(512) + data[e.offset + 512 :],
    "cut off inside a header": lambda data, e: data[: e.offset + 200],
    "cut off between members": lambda data, e: data[: e.offset],
    "cut off inside a body": lambda data, e: data[: e.offset + 600],
    "a byte of a payload flipped": lambda data, e: flip(data, token_place(data, e)),
}
# What stock readers make of it: members that they give of the three there are; None is an error.
STOCK_MEMBERS = dict(zip(TAR_DAMAGE, (1, 1, 1, 1, None, 3), strict=True))


def damaged(folder: Path, kind: str) -> tuple[Path, MemberEntry]:
    members, shards = entries_of(folder)
    path = folder / shards[members[MEMBER].shard].name
    path.write_bytes(TAR_DAMAGE[kind](path.read_bytes(), members[MEMBER]))
    return path, members[MEMBER]


def lost_to(kind: str) -> tuple[int, ...]:
    """What is cut off takes the last member of the shard along."""
    return (MEMBER, MEMBER + 1) if "cut off" in kind else (MEMBER,)


@pytest.mark.parametrize("kind", TAR_DAMAGE)
def test_stock_readers_say_nothing_of_five_kinds_in_six(folder: Path, kind: str) -> None:
    """Why the index keeps a checksum of every entry, header included."""
    path, _ = damaged(folder, kind)

    def tar_members() -> list:
        with tarfile.open(path) as tar:
            return tar.getmembers()

    readers = [lambda: list(webdataset.WebDataset([str(path)], shardshuffle=False)), tar_members]
    for read in readers:
        if STOCK_MEMBERS[kind] is None:
            with pytest.raises(tarfile.ReadError, match="unexpected end of data"):
                read()
        else:
            assert len(read()) == STOCK_MEMBERS[kind]
    if kind == "a byte of a payload flipped":
        samples = list(webdataset.WebDataset([str(path)], shardshuffle=False))
        rows = pa.ipc.open_stream(samples[1]["arrow"]).read_all().column("tokens").to_pylist()
        differing = [i for i, row in enumerate(rows) if row != ROWS["train"][7 * MEMBER + i]]
        assert len(rows) == 7 and len(differing) == 1


@pytest.mark.parametrize("kind", TAR_DAMAGE)
def test_lint_and_stream_find_damage_to_a_tar(folder: Path, kind: str) -> None:
    path, _ = damaged(folder, kind)
    lost = lost_to(kind)
    assert_found(folder, "do not match the checksum", lost)
    problems = lint(folder)["problems"]
    # The file as a whole, and nothing of another file.
    assert any(p["member"] is None for p in problems)
    assert {p["shard"] for p in problems} == {path.name}
    assert {p["member"] for p in problems if "checksum" in p["what"]} == set(lost)


def edit_manifest(folder: Path, split: str, key: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"][split][key] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("key", ["sequences", "tokens", "first_member", "members", "shards"])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_edited_count_in_the_manifest(folder: Path, key: str, split: str) -> None:
    edit_manifest(folder, split, key)
    for message in (lint(folder)["problems"][0]["what"], stream_error(folder), read_error(folder)):
        assert f"{key} of split '{split}' is" in message


def test_an_edited_longest_sequence(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    longest = max(map(len, ROWS["train"]))
    assert manifest["splits"]["train"]["max_tokens"] == longest
    manifest["splits"]["train"]["max_tokens"] = longest - 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = lint(folder)["problems"]
    assert (
        problem["what"] == f"max_tokens of split 'train' is {longest - 1} in the manifest and {longest} in the shards"
    )
    assert f"a sequence of {longest} tokens, but max_tokens of split train is {longest - 1}" in stream_error(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 65), ("tokenizer_sha256", "ab" * 32), ("index_xxh3", "0" * 32)]
)
def test_an_edited_fact_of_the_whole_data_set(folder: Path, key: str, value: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    named = {"vocab_size": "vocab_size is 65", "tokenizer_sha256": "tokenizer", "index_xxh3": "index.arrow"}[key]
    assert any(named in problem["what"] for problem in lint(folder)["problems"])
    assert named in stream_error(folder)


def test_the_manifest_of_another_data_set(folder: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", {"train": some_rows(120, 5), "valid": some_rows(20, 6)})
    shutil.copy(other / "manifest.json", folder / "manifest.json")
    whats = [problem["what"] for problem in lint(folder)["problems"]]
    assert len([w for w in whats if "is not the one that the manifest names" in w]) == 2
    assert "index.arrow is not the one that the manifest names" in stream_error(folder)


def test_swapped_shards(folder: Path) -> None:
    _, shards = entries_of(folder)
    first, second = (folder / shards[number].name for number in (1, 2))
    # The sizes are the same, so that opening sees nothing.
    assert first.stat().st_size == second.stat().st_size
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b), second.write_bytes(a)
    assert Dataset.open(folder).splits == ["train", "valid"]
    for number in range(3, 9):
        whats = [p["what"] for p in lint(folder)["problems"] if p["member"] == number]
        assert any("checksum" in what for what in whats)
    names = [p["what"] for p in lint(folder)["problems"] if "a tar reader finds" in p["what"]]
    assert f"train-000002-{6:08d}.arrow" in names[0] and f"train-000001-{3:08d}.arrow" in names[1]
    assert "does not match" in read_error(folder) or "do not match" in read_error(folder)
    assert f"{first.name}, member 3 of split train at byte 0," in read_error(folder)
    assert "at byte" in stream_error(folder)


def with_metadata(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.replace_schema_metadata({**batch.schema.metadata, b"tokenizer_sha256": b"f" * 64})


def with_token(token: int, place: int = 0) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    """The first sequence of at least two tokens with another one in it."""

    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        rows = batch.column(0).to_pylist()
        next(row for row in rows if len(row) > 1)[place] = token
        return batch.set_column(0, batch.schema.field(0), pa.array(rows, type=batch.schema.field(0).type))

    return change


def with_wide_tokens(batch: pa.RecordBatch) -> pa.RecordBatch:
    field = pa.field("tokens", pa.list_(pa.int32()))
    return pa.record_batch(
        [batch.column(0).cast(field.type), batch.column(1)],
        schema=pa.schema([field, batch.schema.field(1)], batch.schema.metadata),
    )


def with_column(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.append_column("weight", pa.array([1.0] * batch.num_rows))


def without_tokens(batch: pa.RecordBatch) -> pa.RecordBatch:
    rows = [[], *batch.column(0).to_pylist()[1:]]
    return batch.set_column(0, batch.schema.field(0), pa.array(rows, type=batch.schema.field(0).type))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_metadata, "another tokenizer or format: tokenizer ffffffffffff"),
        (with_token(64), "outside the vocabulary of 64"),
        (with_token(65_535), "outside the vocabulary of 64"),
        (with_wide_tokens, "its Arrow schema is (tokens list<item: int32>, doc int64)"),
        (with_column, "its Arrow schema is"),
        (without_tokens, "have no token"),
    ],
)
def test_members_that_fit_all_hashes_and_are_wrong(folder: Path, change: Callable, named: str) -> None:
    change_member(folder, MEMBER, change)
    assert_found(folder, named)
    # Nothing else is wrong with the shard: the tables fit.
    assert {p["member"] for p in lint(folder)["problems"]} - {None} == {MEMBER}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An object store of this test's own, and no copies of tables from another."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return f"memory://{tmp_path.name}"


def put(folder: Path, store: str) -> None:
    fsspec.filesystem("memory").put(str(folder), f"/{store.removeprefix('memory://')}/one", recursive=True)


def read_cached(store: str, cache: Path) -> list[tuple[int, ...]]:
    split = Dataset.open(f"{store}/one").split("train", cache=RangeCache(cache, 2**26))
    return [tuple(row.tolist()) for first in range(0, 120, 7) for row in split.read(first, min(7, 120 - first))]


def cached_files(cache: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in cache.glob("??/*")}


@pytest.mark.parametrize("kind", ["flipped", "cut off", "longer", "empty", "of another range"])
def test_a_stale_cache(clean: Path, store: str, tmp_path: Path, kind: str) -> None:
    put(clean, store)
    truth, cache = [tuple(row) for row in ROWS["train"]], tmp_path / "cache"
    assert read_cached(store, cache) == truth
    whole = cached_files(cache)
    assert len(whole) == 18
    other = next(data[::-1] for data in whole.values())
    change: dict[str, Callable[[bytes], bytes]] = {
        "flipped": lambda data: flip(data, len(data) // 2), "cut off": lambda data: data[:-1],
        "longer": lambda data: data + b"x", "empty": lambda data: b"", "of another range": lambda data: other,
    }  # fmt: skip
    for path, data in whole.items():
        path.write_bytes(change[kind](data))
    assert read_cached(store, cache) == truth
    assert cached_files(cache) == whole
    # And from then on the store is not asked.
    for name in {shard.name for shard in entries_of(clean)[1]}:
        data = (clean / name).read_bytes()
        fsspec.filesystem("memory").pipe(f"/{store.removeprefix('memory://')}/one/{name}", bytes(len(data)))
    assert read_cached(store, cache) == truth


def test_a_cache_of_another_version_of_the_data_set(clean: Path, store: str, tmp_path: Path) -> None:
    put(clean, store)
    read_cached(store, tmp_path / "cache")
    rows = {"train": [[*reversed(row[:-1]), 2] for row in ROWS["train"]], "valid": ROWS["valid"]}
    put(write_dataset(tmp_path / "new", rows), f"{store}-new")
    # The same names, offsets and sizes: what differs is the hash of each shard.
    fsspec.filesystem("memory").rm(f"/{store.removeprefix('memory://')}/one", recursive=True)
    put(tmp_path / "new", store)
    assert read_cached(store, tmp_path / "cache") == [tuple(row) for row in rows["train"]]


def truth_without(members: set[int]) -> Counter[tuple[int, ...]]:
    kept = (row for i, row in enumerate(ROWS["train"]) if i // 7 not in members)
    return Counter(map(tuple, kept))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", TAR_DAMAGE)
def test_skipping_leaves_out_the_damaged_members_and_nothing_else(folder: Path, kind: str, world_size: int) -> None:
    whole = epoch(open_training_data([str(folder)], config()), world_size)
    damaged(folder, kind)
    policy = config(damage="skip", damage_budget_fraction=0.5)
    data = open_training_data([str(folder)], policy, workers=world_size)
    found = epoch(data, world_size)
    lost = lost_to(kind)
    assert found.seen == truth_without(set(lost))
    assert found.real == whole.real == [8] * STEPS * world_size
    assert (whole.skipped, found.skipped) == (0, 7 * len(lost))


def test_a_budget_that_is_used_up_names_itself_and_the_shard(folder: Path) -> None:
    path, entry = damaged(folder, "a byte of a payload flipped")
    for fraction, workers, fits in ((7 / 120, 1, True), (6 / 120, 1, False), (14 / 120, 2, True), (13 / 120, 2, False)):
        policy = config(damage="skip", damage_budget_fraction=fraction)
        data = open_training_data([str(folder)], policy, workers=workers)
        if fits:
            assert epoch(data).seen == truth_without({MEMBER})
            continue
        with pytest.raises(DataError) as caught:
            epoch(data)
        assert f"{path}, member {MEMBER} of split train at byte {entry.offset}, is damaged" in caught.value.message
        assert "7 sequences would be skipped, more than the 6 that data.damage_budget_fraction" in caught.value.message


def test_another_tokenizer_beside_whole_shards(folder: Path) -> None:
    word_tokenizer(59).save(folder / "tokenizer.json")
    assert any("another tokenizer" in problem["what"] for problem in lint(folder)["problems"])
    assert "another tokenizer" in stream_error(folder)
