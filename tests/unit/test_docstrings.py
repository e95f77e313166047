"""The docstring corpus, harvested from small trees of sources that the tests write."""

import gzip
import logging
from pathlib import Path

import pytest

from vae_dist.data.source import docstrings
from vae_dist.data.source.docstrings import harvest_docstrings, sentences_of, summary_sentence


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Sources with docstrings in every place, one that does not parse, and one in Latin 1."""
    root = tmp_path / "lib"
    for folder in ("b_package", "a_package", "site-packages", "a_package/__pycache__"):
        (root / folder).mkdir(parents=True)
    (root / "b_package" / "module.py").write_text(
        '"""Reads the index of a book."""\n'
        "class Book:\n"
        '    """A book with many pages."""\n'
        "    async def open(self):\n"
        '        """Opens the book at a page."""\n'
        "if True:\n"
        "    try:\n"
        "        def hidden():\n"
        '            """Found inside of a block."""\n'
        "    except ImportError:\n"
        "        def spare():\n"
        '            """Used when the import fails."""\n'
        'x = """This string is no docstring."""\n',
        encoding="utf-8",
    )
    (root / "a_package" / "module.py").write_text('"""Reads the index of a book."""\n"\\d"\n', encoding="utf-8")
    (root / "a_package" / "latin.py").write_bytes(
        b'# -*- coding: latin-1 -*-\n"""Holds the names of towns."""\nX = "\xe9"\n'
    )
    (root / "a_package" / "broken.py").write_text('"""Never seen by anyone."""\ndef (:\n', encoding="utf-8")
    (root / "a_package" / "__pycache__" / "m.py").write_text('"""Not a source file."""\n', encoding="utf-8")
    (root / "site-packages" / "third.py").write_text('"""Belongs to another root."""\n', encoding="utf-8")
    return root


def read(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def test_harvest_finds_every_docstring_once_in_file_order(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        harvest = harvest_docstrings(tmp_path / "cache", [tree])
    assert read(harvest.path) == [
        "Holds the names of towns.",
        "Reads the index of a book.",
        "A book with many pages.",
        "Opens the book at a page.",
        "Found inside of a block.",
        "Used when the import fails.",
    ]
    assert (harvest.sentences, harvest.words) == (6, 5 + 6 + 5 + 5 + 5 + 6)
    assert "6 sentences, 32 words from 4 files" in caplog.text
    assert "1 files could not be parsed" in caplog.text


def test_harvest_does_not_depend_on_parallelism(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "_MIN_FILES_PER_TASK", 1)
    many = harvest_docstrings(tmp_path / "many", [tree], workers=3)
    monkeypatch.setattr(docstrings, "_MIN_FILES_PER_TASK", 1000)
    one = harvest_docstrings(tmp_path / "one", [tree], workers=1)
    assert many.path.read_bytes() == one.path.read_bytes()
    assert many.path.name == one.path.name
    # No file name and no time in the gzip header: flags, then four bytes of time.
    assert one.path.read_bytes()[3:8] == bytes(5)


def test_harvest_is_cached_until_a_source_changes(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = harvest_docstrings(tmp_path / "cache", [tree])
    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "_scan", lambda *_: pytest.fail("harvested again"))
        assert harvest_docstrings(tmp_path / "cache", [tree]) == first
    (tree / "a_package" / "more.py").write_text('"""Adds one more sentence."""\n', encoding="utf-8")
    second = harvest_docstrings(tmp_path / "cache", [tree])
    assert second.path != first.path
    assert set(read(second.path)) - set(read(first.path)) == {"Adds one more sentence."}
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted([first.path.name, second.path.name])


def test_bad_escapes_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    assert list(sentences_of(b'"""Splits at the digits."""\nPATTERN = "\\d"\n')) == ["Splits at the digits."]
    assert not recwarn.list


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the first item.", "Return the first item."),
        ("  Return the\n    first item.\n    More follows here.", "Return the first item."),
        ("Return the first item\n   \n    and stop.", "Return the first item"),
        ("Use a :class:`~a.b.Thing` or ``other`` here.", "Use a a.b.Thing or other here."),
        ("See :ref:`the guide <guide>` for more.", "See the guide for more."),
        ("Accept names, e.g. Paris or Rome. Then stop.", "Accept names, e.g. Paris or Rome."),
        ("Build the whole index\n:param name: what it is", "Build the whole index"),
        ("Build the whole index\nArgs:\n    name: what", "Build the whole index"),
        ("Is the index built? Say so.", "Is the index built?"),
    ],
)
def test_summary_sentence(docstring: str, sentence: str) -> None:
    assert summary_sentence(docstring) == sentence


@pytest.mark.parametrize(
    "docstring",
    [
        "Too short.",
        " ".join(["Word"] * 41) + ".",
        "lower case at the start of this.",
        ">>> Print the answer to this",
        "Visit https://example.org for all of this.",
        "Foo(a, b) -> the new value",
        "Set x = y in the table.",
        "Naïve words beyond the alphabet here.",
        "A1 B2 C3 D4 E5 F6 G7.",
        "TODO write all of this text.",
        "Call os.path.join() for the answer.",
        "",
        "====\nTitle\n====",
    ],
)
def test_refused(docstring: str) -> None:
    assert summary_sentence(docstring) is None


def test_forty_words_are_kept() -> None:
    assert summary_sentence(" ".join(["Word"] * 40) + ".") is not None
