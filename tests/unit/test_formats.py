"""Formats beyond plain text: archives, captions, saved datasets; what is read, and what is said about damage."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source.sources import open_source
from vae_dist.errors import DataError

Read = list[tuple[str | None, str]]


def texts(source: Path | str, target_bytes: int = 10**9, **options: Any) -> Read:
    opened = open_source(str(source), PrepareConfig(**options), Path("unused"))
    pieces = [piece for group in opened.pieces(target_bytes) for piece in group]
    return [pair for piece in pieces for pair in opened.read(piece, Counter())]


def plain(source: Path | str, target_bytes: int = 10**9, **options: Any) -> list[str]:
    return [text for _, text in texts(source, target_bytes, **options)]


def error_of(source: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        texts(source, **options)
    return str(caught.value)


def archive(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


SAMPLES = [
    ("a/0001.jpg", b"\xff\xd8" * 700),
    ("a/0001.txt", "\ufeffthe first é\n".encode()),
    ("a/0001.json", b'{"text": "not this one"}'),
    ("a/0002.json", b'{"text": "the second", "url": "x"}'),
    ("a/._0003.txt", b"\x00\x05\x16\x07"),
    ("a/0003.json", b'{"text": "nor this one"}'),
    ("a/0003.seg.txt", b""),
    ("a/0004.cls", b"7"),
    ("b/0001.txt", b"x" * 512),
]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_webdataset(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / name, SAMPLES, "w" if name == "a.tar" else "w:gz")
    assert plain(path) == ["the first é", "the second", "x" * 512]
    assert plain(tmp_path, target_bytes=1) == plain(path)


def test_webdataset_shards_with_splits_and_in_an_object_store(tmp_path: Path) -> None:
    for name in ("train-000000", "train-000001", "valid-000000"):
        archive(tmp_path / f"{name}.tar", [("x.txt", name.encode())])
    assert texts(tmp_path) == [("train", "train-000000"), ("train", "train-000001"), ("valid", "valid-000000")]
    fsspec.filesystem("memory").pipe("/tars/a.tar", archive(tmp_path / "a.tar", SAMPLES).read_bytes())
    assert len(plain("memory://tars/a.tar")) == 3


def test_texts_of_one_sample_are_in_one_split(tmp_path: Path) -> None:
    members = [(f"{i}.{j}.txt", f"text {j} of {i}".encode()) for i in range(200) for j in range(3)]
    found = texts(archive(tmp_path / "a.tar", members), valid_fraction=0.3, test_fraction=0.2)
    splits = [{split for split, text in found if text.endswith(f" of {i}")} for i in range(200)]
    assert all(len(split) == 1 for split in splits)
    assert len(found) == 600 and set().union(*splits) == {"train", "valid", "test"}


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """`tarfile` alone takes many of these for a shorter archive."""
    whole = archive(tmp_path / "a.tar", SAMPLES).read_bytes()
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512
    # One zero block is an end, too.
    (tmp_path / "a.tar").write_bytes(whole[: end + 512])
    assert len(plain(tmp_path / "a.tar")) == 3
    for size in [0, 1, 511, 512, 700, *range(1024, end + 1, 512), end + 100]:
        (tmp_path / "a.tar").write_bytes(whole[:size])
        assert f"{tmp_path / 'a.tar'} is damaged after byte " in error_of(tmp_path / "a.tar"), size


def test_a_damaged_header_is_refused_and_named(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [(f"{i}.txt", b"some text") for i in range(5)])
    whole = path.read_bytes()
    for offset in (2048, 2048 + 150, 4096 + 3):
        damaged = bytearray(whole)
        damaged[offset] ^= 0x15
        path.write_bytes(damaged)
        assert f"is damaged after byte {offset // 1024 * 1024}" in error_of(path)
    path.write_bytes(whole + archive(tmp_path / "b.tar", [("y.txt", b"hidden")]).read_bytes())
    assert "data follow the end of the archive" in error_of(path)
    path.write_bytes(whole[:2048] + bytes(512) + whole[2048:])
    assert "data follow the end of the archive" in error_of(path)
    zipped = gzip.compress(whole)
    (tmp_path / "c.tar.gz").write_bytes(zipped[: len(zipped) // 2])
    assert "cannot be read to its end" in error_of(tmp_path / "c.tar.gz")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"ab\xff", "a.tar: member a.txt is not UTF-8: byte 0xff at offset 514 of the archive"),
        ("a.json", b"{", "a.tar: member a.json at byte 512 is not a JSON object"),
        (
            "a.json",
            b'{"body": "x"}',
            "member a.json at byte 512 has no field 'text' (it has: body). Set prepare.text_f",
        ),
        ("a.json", b'{"text": "\\udc00"}', "half of a surrogate pair"),
        ("a.bin", b"", "holds no .txt and no .json member"),
    ],
)
def test_broken_members(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    assert says in error_of(archive(tmp_path / "a.tar", [(name, content)]))


def coco(count: int = 300, captions: int = 5) -> dict[str, Any]:
    """A file laid out like captions_val2017.json."""
    annotations = [
        {"image_id": 1000 + i, "id": 10 * i + j, "caption": f"Caption {j} of image {i}.\n"}
        for j in range(captions)
        for i in range(count)
    ]
    return {"info": {}, "licenses": [], "images": [{"id": 1000 + i} for i in range(count)], "annotations": annotations}


@pytest.mark.parametrize("name", ["captions.json", "captions.json.gz"])
def test_coco_json(tmp_path: Path, name: str) -> None:
    raw = json.dumps(coco()).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    found = texts(tmp_path / name, recipe="coco_captions", strip_digits=False)
    # One caption is one text.
    assert [text for _, text in found] == [f"caption {j} of image {i}" for j in range(5) for i in range(300)]
    splits = [{split for split, text in found if text.endswith(f" image {i}")} for i in range(300)]
    assert all(len(split) == 1 for split in splits)
    shares = Counter(split for split, _ in found)
    assert set(shares) == {"train", "valid"} and 0.14 < shares["valid"] / 1500 < 0.26


def test_the_official_annotations_folder(tmp_path: Path) -> None:
    for name in ("captions_train2017", "captions_val2017"):
        (tmp_path / f"{name}.json").write_text(json.dumps(coco(3, 1)), encoding="utf-8")
    (tmp_path / "instances_train2017.json").write_text("{}", encoding="utf-8")
    assert Counter(split for split, _ in texts(tmp_path)) == {"train": 3, "valid": 3}
    (tmp_path / "captions_train2014.json").write_text(json.dumps(coco(3, 1)), encoding="utf-8")
    assert "two versions of the train split, captions_train2014.json and captions_train2017.json" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "a.json is not JSON"),
        (b"[]", "holds no captions: there is no list `annotations`"),
        (
            b'{"annotations": [{"caption": "a"}, {"id": 3}]}',
            "annotation 1 has no field 'caption' (it has: id). Give one",
        ),
        (b'{"annotations": [{"caption": 3}]}', "annotation 0: field 'caption' is no string but int"),
        (b'{"annotations": [{"caption": "\xff"}]}', "is not UTF-8: byte 0xff at offset 30"),
    ],
)
def test_broken_coco_json(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert says in error_of(tmp_path / "a.json")


@pytest.mark.parametrize(
    "content",
    [
        'i1.jpg#0\tA dog.\r\ni1.jpg#1\tOne "dog"\n\ni2.jpg#0\tA cat',
        'Image\tnumber\tCaption\ni1.jpg\t0\tA dog.\ni1.jpg\t1\tOne "dog"\ni2.jpg\t0\tA cat\n',
        'caption\timage_id\nA dog.\ti1.jpg\nOne "dog"\ti1.jpg\nA cat\ti2.jpg',
        '\ufeffbody\nA dog.\nOne "dog"\nA cat\n',
    ],
)
def test_tab_separated_captions(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.tsv").write_text(content, encoding="utf-8", newline="")
    assert plain(tmp_path / "a.tsv", text_field="body") == ["A dog.", 'One "dog"', "A cat"]


def test_captions_of_one_image_are_in_one_split(tmp_path: Path) -> None:
    rows = [f"{i}.jpg#{j}\tcaption {j} of image {i}\n" for i in range(200) for j in range(5)]
    (tmp_path / "results.token").write_text("".join(rows), encoding="utf-8")
    found = texts(tmp_path / "results.token", valid_fraction=0.3)
    assert all(len({s for s, text in found if text.endswith(f" image {i}")}) == 1 for i in range(200))
    assert {split for split, _ in found} == {"train", "valid", "test"}


def test_broken_tab_separated_captions(tmp_path: Path) -> None:
    for content, says in (
        ("a.jpg#0\tok\nno tab\n", "a.tsv:2 has 1 tab-separated fields instead of 2"),
        ("a.jpg\t0\tthree fields", "a.tsv:1 has 3 tab-separated fields instead of 2. Mend or remove the line; columns"),
        ("image\tcaption\na.jpg\tone\ttwo", "a.tsv:2 has 3 tab-separated fields instead of 2"),
    ):
        (tmp_path / "a.tsv").write_text(content, encoding="utf-8")
        assert says in error_of(tmp_path / "a.tsv")


@pytest.mark.parametrize("target", [1, 2000, 10**9])
def test_hugging_face_dataset(tmp_path: Path, target: int) -> None:
    rows = [f" row {i} é" for i in range(100)]
    saved = datasets.Dataset.from_dict({"n": range(101), "body": [*rows, None]})
    # Not as it lies in memory, but as the rows stand.
    saved.select(range(99, -1, -1)).save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert plain(tmp_path / "one", target, text_field="body") == [row.strip() for row in reversed(rows)]
    saved.save_to_disk(str(tmp_path / "two"))
    assert plain(tmp_path / "two", target, text_field="body") == [row.strip() for row in rows]


def test_hugging_face_dataset_dict(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": [f"from {name}"]}) for name in ("train", "validation", "test")}
    extra = datasets.Dataset.from_dict({"text": ["aside"]})
    datasets.DatasetDict({**parts, "unsupervised": extra}).save_to_disk(str(tmp_path / "a"))
    expected = [("train", "from train"), ("valid", "from validation"), ("test", "from test")]
    assert texts(tmp_path / "a") == texts(tmp_path / "a", format="datasets") == expected
    datasets.DatasetDict({"test": parts["test"], "extra": extra}).save_to_disk(str(tmp_path / "b"))
    assert texts(tmp_path / "b") == [(None, "from test"), (None, "aside")]


def test_refused_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"body": ["one"], "n": [1]}).save_to_disk(str(saved))
    assert "has no column 'text' (it has: body, n). Set prepare.text_field" in error_of(saved)
    assert "column 'n' holds int64, not text" in error_of(saved, text_field="n")
    (tmp_path / "empty").mkdir()
    assert "holds no dataset_dict.json and no state.json" in error_of(tmp_path / "empty", format="datasets")
    memory = fsspec.filesystem("memory")
    memory.pipe("/saved/state.json", b"{}")
    assert "in an object store. Copy the folder" in error_of("memory://saved")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        assert "pip install 'vae_dist[datasets]'" in error_of(saved)
    next(saved.glob("*.arrow")).write_bytes(b"damaged")
    assert f"{saved} is not a dataset that `datasets` {datasets.__version__} can read" in error_of(saved)
    (saved / "dataset_dict.json").write_text("[]", encoding="utf-8")
    assert "dataset_dict.json names no splits" in error_of(saved)


def test_names_of_well_known_files(tmp_path: Path) -> None:
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"):
        (tmp_path / name).write_text(f" = A = \n \n {name} \n", encoding="utf-8")
    expected = [("test", "wiki.test.tokens"), ("train", "wiki.train.tokens"), ("valid", "wiki.valid.tokens")]
    assert texts(tmp_path) == texts(tmp_path, recipe="wikitext") == expected
    assert len(texts(tmp_path, format="text")) == 6


def test_records_that_a_format_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    says = "prepare.record = document does not go with prepare.format = text. Use record: line or paragraph or sentence"
    assert says in error_of(tmp_path / "a.txt", record="document")
    assert "or format: wikitext." in error_of(tmp_path / "a.txt", record="document")
    assert "record = paragraph does not go with prepare.format = jsonl" in error_of(
        tmp_path / "a.jsonl", record="paragraph"
    )
