"""Merging and splitting data sets: every sequence and document against the inputs, bytes against a second call."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_data import all_rows, change_member, entries_of, some_rows, word_tokenizer, write_dataset

from vae_dist.cli import main
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare import rewrite
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.prepare.rewrite import merge, split
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.lint import lint
from vae_dist.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
Documents = dict[str, list[tuple[int, tuple[int, ...]]]]


def document_numbers(count: int, seed: int) -> list[int]:
    """Not decreasing, some texts of several sequences, some of none."""
    return np.cumsum(np.random.default_rng(seed).choice([0, 1, 1, 1, 3], count)).tolist()


@pytest.fixture
def one(tmp_path: Path) -> Path:
    rows = {"train": some_rows(300, 0), "valid": some_rows(30, 1)}
    docs = {name: document_numbers(len(r), 7) for name, r in rows.items()}
    folder = write_dataset(tmp_path / "one", rows, docs=docs)
    # The last texts gave no sequence either.
    manifest = json.loads((folder / "manifest.json").read_text())
    for facts in manifest["splits"].values():
        facts["texts"] += 50
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> Path:
    rows = {"train": some_rows(95, 2, longest=20), "test": some_rows(25, 3)}
    docs = {name: document_numbers(len(r), 8) for name, r in rows.items()}
    return write_dataset(tmp_path / "two", rows, docs=docs, member_sequences=11)


def documents(folder: Path) -> Documents:
    """(doc, tokens) of every split, read with pyarrow alone."""
    found: Documents = {}
    for name in Dataset.open(folder).splits:
        members, shards = entries_of(folder, name)
        found[name] = []
        for entry in members:
            data = (folder / shards[entry.shard].name).read_bytes()
            table = pa.ipc.open_stream(data[entry.offset + 512 :]).read_all()
            rows = [tuple(row) for row in table.column("tokens").to_pylist()]
            found[name] += zip(table.column("doc").to_pylist(), rows, strict=True)
    return found


def texts(folder: Path, name: str) -> int:
    return json.loads((folder / "manifest.json").read_text())["splits"].get(name, {"texts": 0})["texts"]


def assert_sound(folder: Path, member_sequences: int = 7) -> None:
    """Lint recomputes every total, the histogram and the percentiles; members are of one size, shards about."""
    assert lint(folder)["problems"] == []
    for name in Dataset.open(folder).splits:
        members, shards = entries_of(folder, name)
        assert {entry.sequences for entry in members[:-1]} <= {member_sequences}
        assert len({entry.members for entry in shards[:-1]}) <= 1
        assert max(shard.bytes for shard in shards) < 3 * 8192
    assert not (folder / ".work").exists() and not (folder / ".unfinished-data-set").exists()


def test_merge_concatenates_splits_and_continues_document_numbers(one: Path, two: Path, tmp_path: Path) -> None:
    merge([one, two, one], tmp_path / "out")
    found, inputs = documents(tmp_path / "out"), [documents(path) for path in (one, two, one)]
    for name in SPLITS:
        expected, base = [], 0
        for path, held in zip((one, two, one), inputs, strict=True):
            expected += [(base + doc, row) for doc, row in held.get(name, [])]
            base += texts(path, name)
        assert found[name] == expected
        assert texts(tmp_path / "out", name) == base
    assert all_rows(tmp_path / "out") == {name: [row for _, row in found[name]] for name in SPLITS}
    assert_sound(tmp_path / "out")


def test_merging_one_data_set_cuts_it_like_prepare(tmp_path: Path) -> None:
    """The same cut, and so the same shards, as prepare makes of the same sequences."""
    lines = [" ".join([f"n{i}", *["word"] * (i * 7 % 40)]) for i in range(300)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    options = PrepareConfig(tokenizer="word", max_tokens=16, too_long="split", member_sequences=9, shard_bytes=8192)
    prepare(str(tmp_path / "corpus.txt"), tmp_path / "prepared", options)
    merge([tmp_path / "prepared"], tmp_path / "merged")
    for path in sorted((tmp_path / "prepared").iterdir()):
        if path.name not in ("manifest.json", "origin.json"):
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()
    before, after = (json.loads((tmp_path / d / "manifest.json").read_text()) for d in ("prepared", "merged"))
    assert after.pop("rewritten")["split"] is None
    assert after == before


def test_merge_wants_one_tokenizer(one: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", {"train": some_rows(20, 0, vocab_size=40)}, word_tokenizer(50))
    with pytest.raises(DataError) as caught:
        merge([one, other], tmp_path / "out")
    assert str(one) in caught.value.message and str(other) in caught.value.message
    assert not (tmp_path / "out").exists()


def test_split_moves_whole_texts_and_loses_nothing(one: Path, tmp_path: Path) -> None:
    split(one, tmp_path / "out", 0.2, 0.1, seed=3)
    before, after = documents(one), documents(tmp_path / "out")
    # What was in valid stays in front, with its numbers.
    kept = len(before["valid"])
    assert after["valid"][:kept] == before["valid"]
    moved = {"train": after["train"], "valid": after["valid"][kept:], "test": after["test"]}
    assert Counter(row for rows in moved.values() for _, row in rows) == Counter(row for _, row in before["train"])
    # Sequences of one text are together, in order: texts as lists of sequences are the same before and after.
    grouped = [as_texts(rows) for rows in moved.values()]
    original = as_texts(before["train"])
    assert Counter(text for group in grouped for text in group) == Counter(original)
    for group in grouped:
        rest = iter(original)
        assert all(text in rest for text in group), "the order of the texts has changed"
    # Numbers go on behind those of the texts that were there, and count the texts without a sequence.
    assert min(doc for doc, _ in moved["valid"]) >= texts(one, "valid")
    total = sum(texts(tmp_path / "out", name) for name in SPLITS)
    assert total == texts(one, "train") + texts(one, "valid")
    for name, share in (("valid", 0.2), ("test", 0.1)):
        count, drawn = texts(one, "train"), texts(tmp_path / "out", name) - texts(one, name)
        assert abs(drawn - share * count) < 4 * (count * share * (1 - share)) ** 0.5
    assert_sound(tmp_path / "out")


def as_texts(rows: list[tuple[int, tuple[int, ...]]]) -> list[tuple[tuple[int, ...], ...]]:
    grouped: dict[int, list[tuple[int, ...]]] = {}
    for doc, row in rows:
        grouped.setdefault(doc, []).append(row)
    return [tuple(group) for group in grouped.values()]


def test_the_choice_does_not_depend_on_how_members_are_cut(tmp_path: Path) -> None:
    rows = {"train": some_rows(300, 0)}
    docs = {"train": document_numbers(300, 7)}
    found = []
    for number, size in enumerate((1, 7, 50, 300)):
        folder = write_dataset(tmp_path / f"in{number}", rows, docs=docs, member_sequences=size)
        split(folder, tmp_path / f"out{number}", 0.2, 0.2)
        found.append(documents(tmp_path / f"out{number}"))
    assert found[0] == found[1] == found[2] == found[3]
    split(folder, tmp_path / "other", 0.2, 0.2, seed=1)
    assert documents(tmp_path / "other") != found[0]


def test_repetition_gives_the_same_bytes(one: Path, two: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        merge([one, two], tmp_path / name / "merged")
        split(tmp_path / name / "merged", tmp_path / name / "split", 0.1, 0.1)
    for kind in ("merged", "split"):
        a, b = ({p.name: p.read_bytes() for p in (tmp_path / n / kind).iterdir()} for n in ("a", "b"))
        assert a == b


def test_an_interrupted_rewrite_is_finished_by_the_next(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    merge([one], tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "write_manifest", die)
        with pytest.raises(KeyboardInterrupt):
            merge([one], tmp_path / "out")
    with pytest.raises(DataError, match="no manifest"):
        Dataset.open(tmp_path / "out")
    merge([one], tmp_path / "out")
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert a == b


@pytest.mark.parametrize(
    ("fractions", "error"),
    [
        ((0.0, 0.0), ConfigError),
        ((0.5, 0.5), ConfigError),
        ((-0.1, 0.5), ConfigError),
        ((float("nan"), 0.1), ConfigError),
        ((0.999999, 0.0), DataError),
    ],
)
def test_fractions_that_leave_nothing_are_refused(
    one: Path, tmp_path: Path, fractions: tuple[float, float], error: type[Exception]
) -> None:
    with pytest.raises(error):
        split(one, tmp_path / "out", *fractions)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_folder_that_holds_something_is_refused(one: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        merge([one], tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    before = {path.name: path.read_bytes() for path in one.iterdir()}
    with pytest.raises(DataError, match="holds a data set already"):
        merge([one], one)
    assert {path.name: path.read_bytes() for path in one.iterdir()} == before
    with pytest.raises(DataError, match="no local directory"):
        merge([one], "memory://somewhere")


def test_damage_in_an_input_is_not_copied(one: Path, tmp_path: Path) -> None:
    def outside(batch: pa.RecordBatch) -> pa.RecordBatch:
        field = batch.schema.field(0)
        return batch.set_column(0, field, pa.array([[99, 2]] * 7, type=field.type))

    change_member(one, 3, outside)
    with pytest.raises(DataError, match=r"train-000001\.tar, member 3 of split train at byte 0, holds the token 99"):
        merge([one], tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_commands(one: Path, two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged, parted = str(tmp_path / "merged"), str(tmp_path / "parted")
    assert main(["data", "merge", merged, str(one), str(two)]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: of["sequences"] for name, of in facts["splits"].items()} == {"train": 395, "valid": 30, "test": 25}
    assert main(["data", "split", merged, parted, "--valid-fraction", "0.5", "--seed", "4"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(of["sequences"] for of in facts["splits"].values()) == 450
    assert 100 < facts["splits"]["valid"]["sequences"] - 30 < 300 and facts["splits"]["test"]["sequences"] == 25
    assert main(["data", "split", merged, parted, "--valid-fraction", "0.5"]) == 2
    assert "holds a data set already" in capsys.readouterr().err
