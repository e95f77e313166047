"""Sources: what is read, in which order and split, and what is said about broken input."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source import lines
from vae_dist.data.source.sources import open_source
from vae_dist.errors import DataError


def texts(source: Path | str, **options: Any) -> list[tuple[str | None, str]]:
    return list(open_source(str(source), PrepareConfig(**options), Path("unused")).texts())


def plain(source: Path | str, **options: Any) -> list[str]:
    return [text for _, text in texts(source, **options)]


def error_of(source: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        texts(source, **options)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_lines(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\ufeffone two\r\n\n  three \u2028 four\x0b\n   \nfive\0six\rseven\nlast")
    source = open_source(str(path), PrepareConfig(), tmp_path)
    counts: Counter[str] = Counter()
    found = list(source.texts(counts))
    assert found == [(None, t) for t in ("one two", "three \u2028 four", "five\0six\rseven", "last")]
    assert counts == {"empty_texts": 2}
    counts.clear()
    assert len(list(open_source(str(write(tmp_path / name, "one\n\n")), PrepareConfig(), tmp_path).texts(counts))) == 1
    assert counts == {"empty_texts": 1}


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_byte_order_mark_cut_by_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(lines, "_READ_BYTES", block)
    path = write(tmp_path / "a.txt", "\ufeffone\n\ufefftwo")
    # Only the first one is a mark.
    assert plain(path) == ["one", "\ufefftwo"]


def test_paragraphs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n\none\n two \n\n \nthree\nfour\n")
    assert plain(path, record="paragraph") == ["one two", "three four"]


@given(text=st.text(st.characters(exclude_categories=["Cs"])), block=st.integers(1, 7))
def test_lines_do_not_depend_on_the_block_size(text: str, block: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("lines") / "a.txt", text)
    expected = [line.strip() for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_READ_BYTES", block)
        assert plain(path) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    rows = [{"body": "one\ntwo"}, {"body": None, "id": 1}, {"body": " é "}]
    path = write(tmp_path / name, "\n".join(map(json.dumps, rows)) + "\n\n")
    assert plain(path, text_field="body") == ["one\ntwo", "é"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(["one", None, " two "] * 3000, kind), "n": range(9000)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    assert plain(tmp_path / "a.parquet") == ["one", "two"] * 3000


def test_nested_parquet_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("year=2/b", "year=1/b", "year=1/a", ".hidden/x", "_tmp/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": [name]}), tmp_path / f"{name}.parquet")
    assert plain(tmp_path) == ["year=1/a", "year=1/b", "year=2/b"]


@pytest.mark.parametrize("valid", ["valid", "val", "dev", "validation", "VALID"])
def test_folder_with_splits(tmp_path: Path, valid: str) -> None:
    for name in ("train", valid, "test", "notes"):
        write(tmp_path / f"{name}.txt", f"from {name.lower()}\n")
    assert sorted(texts(tmp_path), key=str) == [
        ("test", "from test"),
        ("train", "from train"),
        ("valid", f"from {valid.lower()}"),
    ]


def test_folder_with_numbered_pieces_of_splits(tmp_path: Path) -> None:
    for name in ("train-00001-of-00002", "train-00000-of-00002", "validation-00000-of-00001"):
        write(tmp_path / f"{name}.jsonl.gz", json.dumps({"text": name}))
    assert texts(tmp_path) == [
        ("train", "train-00000-of-00002"),
        ("train", "train-00001-of-00002"),
        ("valid", "validation-00000-of-00001"),
    ]


def test_folder_without_train_has_no_splits(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "two\n")
    write(tmp_path / "a.jsonl", '{"text": "one"}\n')
    write(tmp_path / "test.txt", "three\n")
    write(tmp_path / "ignored.bin", b"\xff")
    assert texts(tmp_path) == [(None, "one"), (None, "two"), (None, "three")]
    assert plain(tmp_path, format="text") == ["two", "three"]


def test_urls(tmp_path: Path) -> None:
    import fsspec

    write(tmp_path / "train.txt.gz", "one\n")
    assert texts(f"file://{tmp_path}") == [("train", "one")]
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl", b'{"text": "from memory"}\n')
    assert plain("memory://corpus/a.jsonl") == ["from memory"]
    memory.pipe("/corpus/b.txt", b"and text\n")
    assert plain("memory://corpus") == ["from memory", "and text"]


def test_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n")
    before = open_source(str(path), PrepareConfig(), tmp_path).fingerprint
    assert open_source(str(path), PrepareConfig(), tmp_path).fingerprint == before
    write(path, "two\n")
    assert open_source(str(path), PrepareConfig(), tmp_path).fingerprint != before


def test_missing_source_names_near_ones(tmp_path: Path) -> None:
    write(tmp_path / "corpus.txt", "one\n")
    message = error_of(tmp_path / "corpsu.txt")
    assert f"no source {tmp_path / 'corpsu.txt'}" in message
    assert f"Did you mean {tmp_path / 'corpus.txt'}?" in message
    assert "Did you mean" not in error_of(tmp_path / "zzz" / "corpus.txt")
    assert "no source memory://nowhere/a.txt" in error_of("memory://nowhere/a.txt")
    assert "Protocol not known" in error_of("nonsense://a/b.txt")


def test_unknown_kinds(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", b"x")
    assert "no file of a known kind (.txt" in error_of(tmp_path)
    assert "Set prepare.format" in error_of(tmp_path / "a.bin")
    assert plain(tmp_path / "a.bin", format="text") == ["x"]
    assert "reads no files" in error_of(tmp_path / "a.bin", format="docstrings")


def test_two_versions_of_a_split(tmp_path: Path) -> None:
    for name in ("train.txt", "valid.txt", "dev.txt"):
        write(tmp_path / name, "one\n")
    assert "two versions of the valid split, dev.txt and valid.txt" in error_of(tmp_path)
    (tmp_path / "dev.txt").unlink()
    write(tmp_path / "train.txt.gz", "one\n")
    assert "two versions of the train split, train.txt and train.txt.gz" in error_of(tmp_path)


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("before", "bad"),
    [
        ("", b"\xff"),
        ("café\n" * 3, b"\xe9 x\n"),
        ("\ufeffab", b"\x80"),
        ("x\n", "é".encode()[:1]),
        ("é", b"\xf0\x9f\x98"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_not_utf8_names_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: str, bad: bytes, block: int
) -> None:
    monkeypatch.setattr(lines, "_READ_BYTES", block)
    content = (before if name != "a.jsonl" else '{"text": "é"}\n') + ""
    path = write(tmp_path / name, content.encode() + bad)
    message = error_of(path)
    assert f"{path} is not UTF-8: byte 0x{bad[0]:02x} at offset {len(content.encode())}" in message
    assert ("of the decompressed text" in message) == name.endswith(".gz")


def test_broken_gzip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", "some text\n" * 1000)
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    assert f"{path} cannot be read to its end" in error_of(path)
    path.write_bytes(whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:])
    assert f"{path} cannot be read to its end" in error_of(path)
    path.write_bytes(b"plain text\n")
    assert f"{path} cannot be read to its end" in error_of(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not a JSON object"),
        ("[" * 100_000, "is not a JSON object"),
        ('["a"]', "has no field 'text' (it has: no object but list)"),
        ('{"body": 1, "title": 2}', "has no field 'text' (it has: body, title). Set prepare.text_field"),
        ('{"text": 5}', "field 'text' is no string but int"),
        (r'{"text": "a\ud83d"}', r"half of a surrogate pair, \ud83d"),
    ],
)
def test_broken_jsonl(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n\n{line}\n')
    message = error_of(path)
    assert message.startswith(f"{path}:3")
    assert says in message


def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one"], "n": [1]}), path)
    assert "has no column 'text' (it has: body, n)" in error_of(path)
    assert "column 'n' holds int64, not text" in error_of(path, text_field="n")
    path.write_bytes(path.read_bytes()[:-5])
    assert f"{path} cannot be read as Parquet" in error_of(path)
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": bad}), path)
    assert "column 'text' is not UTF-8" in error_of(path)


def test_memory_stays_flat(tmp_path: Path) -> None:
    """A file is read in blocks: far less is held than the file has."""
    import tracemalloc

    path = write(tmp_path / "a.txt", ("word " * 20 + "\n") * 400_000)
    assert path.stat().st_size > 40_000_000
    tracemalloc.start()
    count = sum(1 for _ in open_source(str(path), PrepareConfig(), tmp_path).texts())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 400_000
    assert peak < 8_000_000
