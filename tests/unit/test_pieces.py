"""Pieces of files: wherever a file is cut, every record is read once, and the cut depends on the files alone."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source import lines as lines_module
from vae_dist.data.source.pieces import Piece, pack
from vae_dist.data.source.sources import Source, open_source
from vae_dist.errors import DataError

Read = list[tuple[str | None, str]]


def source_of(path: Path | str, **options: Any) -> Source:
    return open_source(str(path), PrepareConfig(**options), Path("unused"))


def read(source: Source, pieces: list[Piece], counts: Counter[str] | None = None) -> Read:
    return [pair for piece in pieces for pair in source.read(piece, Counter() if counts is None else counts)]


def read_all(source: Source, target_bytes: int) -> Read:
    return read(source, [piece for group in source.pieces(target_bytes) for piece in group])


def error_in(source: Source, target_bytes: int) -> str:
    with pytest.raises(DataError) as caught:
        read_all(source, target_bytes)
    return str(caught.value)


def paragraphs(text: str) -> list[str]:
    """Paragraphs of a whole text, found in another way than the reader's."""
    stripped = [line.strip() for line in text.split("\n")]
    return [" ".join(group) for filled, group in itertools.groupby(stripped, bool) if filled]


def documents(text: str) -> list[str]:
    """Documents of a whole text: what stands between titles, which are lines ` = x = ` before an empty line."""
    found: list[list[str]] = [[]]
    stripped = [line.strip() for line in text.split("\n")]
    for line, following in zip(stripped, [*stripped[1:], ""], strict=True):
        if line == "= x =" and not following:
            found.append([])
        elif line and (line != "= = y = =" or following):
            found[-1].append(line)
    return [" ".join(document) for document in found if document]


def wiki_lines(text: str) -> list[str]:
    """Lines of a whole text that are neither empty nor headings, which an empty line follows."""
    stripped = [line.strip() for line in text.split("\n")]
    pairs = zip(stripped, [*stripped[1:], ""], strict=True)
    return [line for line, following in pairs if line and (line not in ("= x =", "= = y = =") or following)]


PLAIN = st.text(st.sampled_from("aé😀\r\n\n\n \u2028\x85\xa0\x0b\0"), max_size=60)
WIKI = st.lists(
    st.sampled_from([" = x = ", " = = y = = ", "", " ", "\r", "é 😀", "b . c", " = x = \r", "= d"]), max_size=20
).map("\n".join)
REFERENCES = {
    ("text", "line"): lambda text: [line.strip() for line in text.split("\n") if line.strip()],
    ("text", "paragraph"): paragraphs,
    ("wikitext", "document"): documents,
    ("wikitext", "line"): wiki_lines,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pieces")


@pytest.mark.parametrize(("kind", "record"), REFERENCES)
@given(
    text=st.one_of(PLAIN, WIKI),
    ends=st.booleans(),
    cuts=st.lists(st.integers(0, 120), max_size=6),
    block=st.sampled_from([1, 2, 3, 7, 1 << 20]),
)
@example(text="", ends=False, cuts=[0, 1], block=1)
@example(text="a\n\n\n\nb", ends=True, cuts=[1, 2, 3, 4, 5], block=2)
@example(text=" = x = \n\na\n = x = \n\nb\n = x = \nc", ends=False, cuts=[1, 8, 9, 10, 11, 12, 19, 20, 21, 22], block=3)
@settings(max_examples=150, deadline=None)
def test_any_cuts_give_every_record_once(
    folder: Path, kind: str, record: str, text: str, ends: bool, cuts: list[int], block: int
) -> None:
    text += "\n" * ends
    path = folder / "a.txt"
    path.write_bytes(text.encode())
    bounds = sorted({0, *(cut for cut in cuts if cut <= len(text.encode()))})
    pieces = [Piece(str(path), kind, None, a, b, 0) for a, b in zip(bounds, [*bounds[1:], None], strict=True)]
    source = source_of(path, format=kind, record=record)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "_READ_BYTES", block)
        whole, cut = Counter[str](), Counter[str]()
        expected = read(source, [Piece(str(path), kind, None, 0, None, 0)], whole)
        assert read(source, pieces, cut) == expected
    assert cut == whole
    assert [t for _, t in expected] == REFERENCES[kind, record](text)


@pytest.mark.parametrize("target", [1, 10, 97, 10_000])
def test_jsonl_and_sentences_are_cut_by_bytes(tmp_path: Path, target: int) -> None:
    rows = [{"text": f"é number {i} .\nand more"} for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    source = source_of(path)
    groups = source.pieces(target)
    assert len(groups) == -(-path.stat().st_size // target)
    assert [t for _, t in read_all(source, target)] == [row["text"] for row in rows]
    text = tmp_path / "a.txt"
    text.write_text("one . two ?\nthree ! four\n" * 20, encoding="utf-8")
    assert [t for _, t in read_all(source_of(text, record="sentence"), target)] == [
        "one .",
        "two ?",
        "three !",
        "four",
    ] * 20


def test_a_record_that_spans_pieces_belongs_to_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 100 + "\nlast\n", encoding="utf-8")
    source = source_of(path)
    groups = source.pieces(20)
    assert [len(read(source, group)) for group in groups] == [1, 0, 0, 0, 0, 1]
    assert sum(piece.bytes for group in groups for piece in group) == path.stat().st_size


@pytest.mark.parametrize("target", [1, 1000, 30_000, 10**9])
def test_parquet_is_cut_by_row_groups(tmp_path: Path, target: int) -> None:
    texts = [f"row {i} " + "word " * (i % 7) for i in range(5000)]
    pq.write_table(pa.table({"n": range(5000), "text": texts}), tmp_path / "a.parquet", row_group_size=700)
    source = source_of(tmp_path / "a.parquet")
    pieces = [piece for group in source.pieces(target) for piece in group]
    assert len(pieces) == {1: 8, 1000: 8, 30_000: 4, 10**9: 1}[target]
    assert [t for _, t in read(source, pieces)] == [text.strip() for text in texts]


def test_an_error_in_a_piece_names_the_byte_of_the_file(tmp_path: Path) -> None:
    good = b'{"text": "a"}\n' * 10
    path = tmp_path / "a.jsonl"
    path.write_bytes(good + b"{\n" + good)
    assert error_in(source_of(path), 10**6).startswith(f"{path}:11 at byte {len(good)} is not a JSON object")
    assert error_in(source_of(path), 20).startswith(f"{path} at byte {len(good)} is not a JSON object")
    path.write_bytes(good + b'{"text": "\xff"}\n' + good)
    for target in (20, 10**6):
        assert f"{path} is not UTF-8: byte 0xff at offset {len(good) + 10}" in error_in(source_of(path), target)
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    tables = [pa.table({"text": ["x" * 1000]}), pa.table({"text": bad})]
    pq.write_table(pa.concat_tables(tables), tmp_path / "a.parquet", row_group_size=1)
    assert "from row 0 of row group 1 on" in error_in(source_of(tmp_path / "a.parquet"), 100)
    (tmp_path / "b.parquet").write_bytes(b"PAR1" + bytes(1000))
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        source_of(tmp_path / "b.parquet").pieces(100)


def test_small_files_are_packed_and_order_is_kept(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}\n" * (40 if i == 7 else 1), encoding="utf-8")
    (tmp_path / "20.txt.gz").write_bytes(gzip.compress(b"zipped\n" * 100_000))
    source = source_of(tmp_path)
    groups = source.pieces(50)
    assert [len(group) for group in groups] == [7, 1, 1, 1, 1, 1, 1, 6, 6, 1]
    assert all(sum(piece.bytes for piece in group) <= 50 for group in groups[:-1])
    # A compressed file cannot be entered in its middle.
    assert (groups[-1][0].start, groups[-1][0].stop) == (0, None)
    assert read_all(source, 50) == read_all(source, 10**9) == list(source.texts())
    assert source.pieces(50) == source_of(tmp_path).pieces(50)
    assert pack([], 5) == []


def test_pieces_keep_the_split_of_their_file(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text\n" * 10, encoding="utf-8")
    found = Counter(read_all(source_of(tmp_path), 30))
    assert found == {(name, f"{name} text"): 10 for name in ("train", "valid", "test")}


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_source_can_be_sent_to_another_process(tmp_path: Path, where: str) -> None:
    content = b"".join(b"line %d\n" % i for i in range(100))
    (tmp_path / "a.txt").write_bytes(content)
    fsspec.filesystem("memory").pipe("/pieces/a.txt", content)
    source = source_of(tmp_path / "a.txt" if where == "local" else "memory://pieces/a.txt")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.pieces(64) == source.pieces(64)
    assert read_all(copy, 64) == [(None, f"line {i}") for i in range(100)]
