"""`data lint`, `data info` and `data preview`: a whole data set has no problem, and each rule finds what breaks it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from small_data import all_rows, change_member, entries_of, some_rows, write_dataset

from vae_dist.cli import main
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.store import overlap
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.info import describe
from vae_dist.data.store.lint import lint
from vae_dist.data.store.overlap import Overlaps, sequence_hashes
from vae_dist.data.store.sequences import Sequences

ROWS = {"train": some_rows(120, 0), "valid": some_rows(20, 1), "test": some_rows(15, 2)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", ROWS)


def whats(folder: Path) -> list[str]:
    return [problem["what"] for problem in lint(folder)["problems"]]


def test_a_prepared_data_set_has_no_problem(tmp_path: Path) -> None:
    lines = [" ".join([f"n{i}", *["word"] * (i * 7 % 40)]) for i in range(300)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    for kind, policy in (("word", "split"), ("bpe", "truncate")):
        options = PrepareConfig(tokenizer=kind, max_tokens=16, too_long=policy, member_sequences=9, shard_bytes=4096)
        dataset = prepare(str(tmp_path / "corpus.txt"), tmp_path / kind, options)
        report = lint(tmp_path / kind)
        assert report["problems"] == []
        counted = {
            key: sum(facts[key] for facts in dataset.manifest["splits"].values()) for key in ("sequences", "tokens")
        }
        assert {key: report[key] for key in counted} == counted
        assert report["members"] == dataset.index.num_rows
        assert report["shards"] == len(list((tmp_path / kind).glob("*.tar")))


def test_counts_and_speed(folder: Path) -> None:
    report = lint(folder)
    assert report["sequences"] == 155
    assert report["tokens"] == sum(len(row) for rows in ROWS.values() for row in rows)
    assert report["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert report["bytes_per_second"] == pytest.approx(report["bytes"] / report["seconds"], rel=0.2)


def test_an_object_store_reads_like_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    damaged = bytearray((folder / "valid-000000.tar").read_bytes())
    damaged[700] ^= 1
    (folder / "valid-000000.tar").write_bytes(damaged)
    fsspec.filesystem("memory").put(str(folder), f"/{tmp_path.name}", recursive=True)
    local, remote = lint(folder), lint(f"memory://{tmp_path.name}")
    assert remote["problems"] == local["problems"] != []
    assert remote["tokens"] == local["tokens"]


def test_it_finds_everything_that_is_wrong(folder: Path) -> None:
    """Faults in many files at once hide none of each other."""
    _, shards = entries_of(folder)
    (folder / shards[0].name).unlink()
    (folder / shards[1].name).write_bytes(b"")
    (folder / shards[2].name).write_bytes(b"no tar at all" * 1000)
    data = bytearray((folder / shards[3].name).read_bytes())
    data[0] ^= 1
    (folder / shards[3].name).write_bytes(data)
    (folder / shards[4].name).write_bytes((folder / shards[4].name).read_bytes() + bytes(512))
    (folder / "tokenizer.json").write_text("{")
    (folder / "stranger.txt").write_text("hello")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["test"]["unknown_tokens"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = lint(folder)
    found = {(p["shard"], p["what"].split(":")[0]) for p in report["problems"] if p["member"] is None}
    assert (shards[0].name, "it is not there") in found
    assert (shards[1].name, f"it has 0 bytes, but {shards[1].bytes} were written") in found
    assert any(shard == shards[2].name and "a tar reader gives up" in what for shard, what in found)
    assert (shards[3].name, "it is not the file that was written") in found
    assert (shards[4].name, f"it has {shards[4].bytes + 512} bytes, but {shards[4].bytes} were written") in found
    assert any("tokenizer" in what for shard, what in found if shard is None)
    unknown = sum(row.count(3) for row in ROWS["test"])
    assert (
        None,
        f"unknown_tokens of split 'test' is {unknown + 1} in the manifest and {unknown} in the shards",
    ) in found
    assert "1 file belongs to no table: stranger.txt" in [note["what"] for note in report["notes"]]
    checksums = {p["member"] for p in report["problems"] if "match the checksum" in p["what"]}
    assert checksums == {3, 4, 5, 6, 7, 8, 9}
    assert all(problem["fix"] for problem in report["problems"])


@pytest.mark.parametrize("name", ["index.arrow", "shards.arrow", "manifest.json"])
def test_what_is_lost_does_not_hide_what_is_damaged(folder: Path, name: str) -> None:
    """Without tables the members are found as other tar readers find them."""
    change_member(folder, 4, with_rows(lambda rows: [[1, *rows[0]], *rows[1:]]))
    (folder / name).write_bytes(b"{" + (folder / name).read_bytes()[1:-3])
    report = lint(folder)
    assert any(name in problem["what"] for problem in report["problems"])
    assert any(
        "padding (0) or a beginning" in p["what"] for p in report["problems"] if p["shard"] == "train-000001.tar"
    )
    assert report["sequences"] == 155


def with_rows(change: Callable[[list[list[int]]], list[list[int]]]) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    def changed(batch: pa.RecordBatch) -> pa.RecordBatch:
        field = batch.schema.field(0)
        rows = change(batch.column(0).to_pylist())
        return pa.record_batch([pa.array(rows, type=field.type), batch.column(1)], schema=batch.schema)

    return changed


def with_docs(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    return lambda batch: batch.set_column(1, "doc", pa.array(change(batch.column(1).to_numpy()), type=pa.int64()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_rows(lambda rows: [*rows[:2], [5], *rows[3:]]), "1 of its sequences have a last token that is no end"),
        (with_rows(lambda rows: [*rows[:2], [2, 2], *rows[3:]]), "(2) before the end, the first is 58 (token 2)"),
        (with_rows(lambda rows: [[0, 2], [0, 2], *rows[2:]]), "2 of its sequences have padding (0)"),
        (with_rows(lambda rows: [[1, 2], *rows[1:]]), "beginning of sequence (1), the first is 56 (token 1)"),
        (with_rows(lambda rows: [*rows[:6], [64, 2]]), "outside the vocabulary of 64, the first is 62 (token 64)"),
        (with_rows(lambda rows: [*rows[:3], [], *rows[4:]]), "1 of its sequences have no token, the first is 59"),
        (with_docs(lambda docs: docs[::-1].copy()), "its doc numbers decrease"),
        (with_docs(lambda docs: docs - 1000), "are negative"),
        (with_docs(lambda docs: docs - 5), "its first doc number is 51, but the member before it ended with 55"),
    ],
)  # fmt: skip
def test_rules_for_tokens_and_documents(folder: Path, change: Callable, named: str) -> None:
    entry = change_member(folder, 8, change)
    found = [p for p in lint(folder)["problems"] if p["shard"] == "train-000002.tar"]
    assert any(named in problem["what"] for problem in found), found
    assert {problem["member"] for problem in found} == {8}
    assert {problem["offset"] for problem in found} <= {entry.offset, None}


def test_texts_are_at_least_as_many_as_the_documents_name(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["texts"] = 119
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert whats(folder) == ["texts of split 'train' is 119 in the manifest, but a text has number 119"]


@pytest.mark.parametrize("fact", ["length_histogram", "length_percentiles", "max_tokens", "unknown_tokens"])
def test_facts_that_opening_does_not_check(folder: Path, fact: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    wrong = manifest["splits"]["valid" if fact != "max_tokens" else "train"][fact]
    facts = manifest["splits"]["train"]
    facts[fact] = wrong if isinstance(wrong, dict) else wrong + 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert all_rows(folder)["train"] == [tuple(row) for row in ROWS["train"]]
    (what,) = whats(folder)
    assert what.startswith(f"{fact} of split 'train' is")


def test_common_sequences_of_splits_are_counted(tmp_path: Path) -> None:
    shared, twice = [7, 8, 9, 2], [10, 2]
    # Words that stand elsewhere in no split, so that nothing else is common.
    rows = {
        "train": [
            *([30 + i, 31 + j, 2] for i in range(10) for j in range(4)),
            shared,
            twice,
            twice,
            twice,
            [8, 7, 9, 2],
        ],
        "valid": [[20, 21, 2], shared, shared, twice, [9, 8, 7, 2], [7, 8, 2]],
        "test": [[22, 2], twice, [7, 8, 9, 9, 2]],
    }
    report = lint(write_dataset(tmp_path / "data", rows, member_sequences=4))
    assert report["problems"] == []
    found = {tuple(note["sequences"]): note for note in report["notes"]}
    assert found[("valid", "train")]["sequences"] == {"valid": 3, "train": 4}
    assert found[("test", "train")]["sequences"] == {"test": 1, "train": 3}
    assert found[("test", "valid")]["sequences"] == {"test": 1, "valid": 1}
    for note in report["notes"]:
        for example in note["examples"]:
            (a, i), (b, j) = example.items()
            assert rows[a][i] == rows[b][j]


def test_the_hash_is_of_the_tokens_and_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*some_rows(3000, 3, longest=4, vocab_size=12), [5, 6, 2], [6, 5, 2], [5, 5, 6, 2]]
    hashes = sequence_hashes(Sequences.from_list([np.array(row, dtype=np.uint16) for row in rows]))
    by_hash: dict[int, set[tuple[int, ...]]] = {}
    for row, value in zip(rows, hashes.tolist(), strict=True):
        by_hash.setdefault(value, set()).add(tuple(row))
    assert all(len(same) == 1 for same in by_hash.values())
    assert len(by_hash) == len(set(map(tuple, rows)))


def test_large_splits_are_compared_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_KEPT_SEQUENCES", 1000)
    distinct = [[4 + i % 50, 4 + i // 50 % 50, 4 + i // 2500, 2] for i in range(10_000)]
    rows = Sequences.from_list([np.array(row) for row in distinct])
    overlaps = Overlaps({"valid": 8000, "train": 10_000})
    overlaps.add("valid", 0, rows.slice(0, 8000))
    assert len(overlaps._held[0][0]) < 1300
    overlaps.close("valid")
    overlaps.add("train", 0, rows)
    (note,) = overlaps.notes()
    assert "1 in 8" in note["what"]
    # A binomial of 8,000 draws at 1/8 has a standard deviation of 30.
    assert abs(note["sequences"]["valid"] - 1000) < 150
    assert note["sequences"]["valid"] == note["sequences"]["train"]


def run(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> tuple[dict, str]:
    assert main(list(arguments)) == status
    captured = capsys.readouterr()
    return json.loads(captured.out.strip().splitlines()[-1]), captured.err


def test_the_lint_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, errors = run(capsys, 0, "data", "lint", str(folder))
    assert report["problems"] == [] and "error" not in errors and "problem" not in errors
    data = bytearray((folder / "test-000000.tar").read_bytes())
    data[700] ^= 1
    (folder / "test-000000.tar").write_bytes(data)
    report, errors = run(capsys, 1, "data", "lint", str(folder))
    assert len(report["problems"]) == 2
    assert "problem: test-000000.tar, member 0, byte 0: its" in errors
    assert errors.strip().splitlines()[-1] == f"error: {folder} has 2 problems; see above."
    assert main(["data", "lint", str(folder / "missing")]) == 2
    (folder / "manifest.json").unlink()
    assert main(["data", "lint", str(folder)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_info_counts_members_bytes_and_tokens_per_shard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, table = run(capsys, 0, "data", "info", str(folder))
    for split, rows in ROWS.items():
        per_shard = [sum(map(len, rows[i : i + 21])) for i in range(0, len(rows), 21)]
        wanted = {"min": min(per_shard), "mean": pytest.approx(np.mean(per_shard)), "max": max(per_shard)}
        assert facts["splits"][split]["tokens_per_shard"] == wanted
        assert facts["splits"][split]["members"] == -(-len(rows) // 7)
        assert facts["splits"][split]["bytes"] == sum(p.stat().st_size for p in folder.glob(f"{split}-*.tar"))
    line = next(line for line in table.splitlines() if line.startswith("tokens per shard, max"))
    assert line.split()[4:] == [f"{facts['splits'][s]['tokens_per_shard']['max']:,}" for s in ROWS]


def test_info_of_a_damaged_manifest_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads((folder / "manifest.json").read_text())
    histogram = whole["splits"]["train"]["length_histogram"]
    for change in (
        lambda m: m.pop("source"),
        lambda m: m.pop("options"),
        lambda m: m["splits"]["train"].pop("truncated"),
        lambda m: m["splits"]["train"].update(length_histogram=histogram | {"counts": [0]}),
        lambda m: m["splits"]["train"].update(length_histogram=histogram | {"counts": ["1"]}),
        lambda m: m["splits"]["train"].update(length_histogram=[]),
    ):
        manifest = json.loads(json.dumps(whole))
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert main(["data", "info", str(folder)]) == 2
        assert "manifest.json is damaged" in capsys.readouterr().err
        assert any("in the manifest" in what for what in whats(folder))


def test_preview_by_shard_and_index(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decode = Dataset.open(folder).tokenizer.decode
    # Three members of seven sequences are a shard.
    for split, shard, index, num in (
        ("train", "train-000002.tar", 5, 3),
        ("train", "train-000005", 0, 2),
        ("valid", "valid-000000", 18, 9),
    ):
        found, _ = run(
            capsys, 0, "data", "preview", str(folder), "--shard", shard, "--index", str(index), "--num", str(num)
        )
        first = 21 * int(shard.removesuffix(".tar")[-6:]) + index
        wanted = ROWS[split][first : min(first + num, 21 * (first // 21 + 1))]
        assert found == {"split": split, "first": first, "texts": [decode(row) for row in wanted]}
    by_split, _ = run(capsys, 0, "data", "preview", str(folder), "--split", "test", "--first", "4", "--num", "1")
    assert by_split["texts"] == [decode(ROWS["test"][4])]
    for arguments, named in (
        (
            ["--shard", "train-000009"],
            "has no shard train-000009.tar. Its shards are train-000000.tar to test-000000.tar",
        ),
        (["--shard", "train-000000", "--index", "21"], "has no sequence 21. Choose one from 0 to 20"),
        (["--shard", "train-000000", "--split", "train"], "Give one pair"),
        (["--index", "3"], "Say in which with --shard"),
    ):
        assert main(["data", "preview", str(folder), *arguments]) == 2
        assert named in capsys.readouterr().err


def test_describe_is_of_the_data_set_that_was_opened(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert describe(Dataset.open(copy)) | {"path": ""} == describe(Dataset.open(folder)) | {"path": ""}
