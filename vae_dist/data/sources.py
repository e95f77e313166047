"""Where text comes from: a source yields (split, text) pairs in a fixed order, reading as it goes.

Kinds: the docstring corpus; text files (a sequence a line or a paragraph), JSONL, both gzip too; Parquet, local
or in an object store. A directory with train, valid and test files brings its own split; otherwise the split
is None and decided by a hash of the text.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.dataset

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.docstrings import harvest_docstrings
from vae_dist.errors import DataError

SPLIT_NAMES = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid", "test": "test"}
_FORMAT_OF_SUFFIX = {".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_READ_BYTES = 1 << 20

Text = tuple[str | None, str]


@dataclass(frozen=True)
class SourceFile:
    """One file or URL, its format, and the split its name says (None: decided by hash)."""

    path: str
    format: str
    split: str | None


@dataclass(frozen=True)
class Source:
    """A corpus that can be read again and again.

    Attributes:
        name: as the user wrote it.
        fingerprint: changes when the files change; JSON-able.
    """

    name: str
    files: list[SourceFile]
    fingerprint: list[Any]
    options: PrepareConfig

    def texts(self) -> Iterator[Text]:
        """(split, text) of every non-empty text, in order.

        Raises:
            DataError: a file is not UTF-8, a JSON line is broken, or a field is missing; says where.
        """
        for file in self.files:
            for text in _READERS[file.format](file.path, self.options):
                stripped = text.strip()
                if stripped:
                    yield file.split, stripped


def open_source(name: str, options: PrepareConfig, cache_dir: Path) -> Source:
    """Find the files of a source.

    Raises:
        DataError: nothing there, or nothing of a known kind.
    """
    if name == "docstrings" and options.format in ("auto", "docstrings"):
        harvest = harvest_docstrings(cache_dir)
        return Source(name, [SourceFile(str(harvest.path), "text", None)], [harvest.path.name], options)
    if "://" in name:
        file = SourceFile(name, _format_of(name, options), None)
        return Source(name, [file], [name], options)
    path = Path(name)
    if not path.exists():
        raise DataError(f"There is no source {name}.{_near(path)} Give a file, a directory, a URL, or `docstrings`.")
    files = _files_in(path, options) if path.is_dir() else [SourceFile(str(path), _format_of(name, options), None)]
    stats = [Path(f.path).stat() for f in files]
    prints = [[Path(f.path).name, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
    return Source(str(path.resolve()), files, prints, options)


def _files_in(folder: Path, options: PrepareConfig) -> list[SourceFile]:
    known = [p for p in sorted(folder.iterdir()) if p.is_file() and _suffix(p.name) in _FORMAT_OF_SUFFIX]
    named = [p for p in known if _stem(p.name) in SPLIT_NAMES]
    if any(SPLIT_NAMES[_stem(p.name)] == "train" for p in named):
        known = named
    if not known:
        raise DataError(
            f"{folder} holds no file of a known kind ({', '.join(_FORMAT_OF_SUFFIX)}, text and JSONL also with .gz). "
            "Files called train, valid and test are used as the splits."
        )
    return [
        SourceFile(str(p), _format_of(p.name, options), SPLIT_NAMES.get(_stem(p.name)) if known is named else None)
        for p in known
    ]


def _format_of(name: str, options: PrepareConfig) -> str:
    if options.format not in ("auto", "docstrings"):
        return options.format
    suffix = _suffix(name)
    # A file without a known ending is read as text, a URL without one as a Parquet folder.
    return _FORMAT_OF_SUFFIX.get(suffix, "parquet" if "://" in name else "text")


def _suffix(name: str) -> str:
    return Path(name.removesuffix(".gz")).suffix.lower()


def _stem(name: str) -> str:
    return Path(name.removesuffix(".gz")).stem.lower()


def _near(path: Path) -> str:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def _read_text(path: str, options: PrepareConfig) -> Iterator[str]:
    if options.record == "line":
        yield from _lines(path)
        return
    paragraph: list[str] = []
    for line in _lines(path):
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            yield " ".join(paragraph)
            paragraph = []
    if paragraph:
        yield " ".join(paragraph)


def _read_jsonl(path: str, options: PrepareConfig) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not a JSON object: {error}. Mend or remove the line.") from None
        if not isinstance(record, dict) or options.text_field not in record:
            fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{path}:{number} has no field {options.text_field!r} (it has: {fields}). Set text_field to the one "
                "that holds the text."
            )
        text = record[options.text_field]
        if not isinstance(text, str):
            raise DataError(f"{path}:{number}: field {options.text_field!r} is no string but {type(text).__name__}.")
        yield text


def _read_parquet(path: str, options: PrepareConfig) -> Iterator[str]:
    try:
        table = pyarrow.dataset.dataset(path, format="parquet")
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}. Check the path and its permissions.") from None
    if options.text_field not in table.schema.names:
        raise DataError(
            f"{path} has no column {options.text_field!r} (it has: {', '.join(table.schema.names)}). Set text_field to "
            "the one that holds the text."
        )
    for batch in table.to_batches(columns=[options.text_field]):
        for value in batch.column(0).to_pylist():
            if value is not None:
                yield str(value)


_READERS: dict[str, Callable[[str, PrepareConfig], Iterator[str]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


def _lines(path: str) -> Iterator[str]:
    """Lines of a UTF-8 file without their endings, decoded piece by piece. Only \\n and \\r\\n end a line."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, offset = "", 0
    with _open(path) as stream:
        while True:
            try:
                block = stream.read(_READ_BYTES)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path} cannot be read to its end: {error}. Copy or compress it again.") from None
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                inside = " of the decompressed text" if path.endswith(".gz") else ""
                raise DataError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {at}{inside}. Convert it, for "
                    "instance with `iconv -f LATIN1 -t UTF-8`."
                ) from None
            offset += len(block)
            *whole, rest = (rest + text).split("\n")
            yield from (line.removesuffix("\r") for line in whole)
            if not block:
                break
    if rest:
        yield rest


def _open(path: str) -> BinaryIO:
    if "://" in path:
        from pyarrow import fs

        filesystem, inner = fs.FileSystem.from_uri(path)
        return filesystem.open_input_stream(inner)
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]
