"""Where text comes from: a source yields (split, text) pairs in a fixed order, reading as it goes.

Kinds: the docstring corpus; text files (a sequence a line or a paragraph) and JSONL, both gzip too; Parquet. All
but the first may lie in an object store. A folder with train, valid and test files brings its own split; otherwise
the split is None and decided by a hash of the text.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.docstrings import harvest_docstrings
from vae_dist.data.filesystem import resolve
from vae_dist.data.records import READERS
from vae_dist.errors import DataError

_SPLIT_OF_WORD = {
    "train": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid", "test": "test",
}  # fmt: skip
_FORMAT_OF_SUFFIX = {
    ".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
}  # fmt: skip
# train.txt, and the numbered pieces of a split: train-00000-of-00004.parquet.
_SPLIT_NAME = re.compile(rf"({'|'.join(_SPLIT_OF_WORD)})(?:[-_.]\d.*)?")


@dataclass(frozen=True)
class SourceFile:
    """One file, its format, and the split its name says (None: decided by hash)."""

    path: str
    format: str
    split: str | None
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """A corpus that can be read again and again.

    Attributes:
        name: `docstrings`, an absolute path, or a URL.
        files: in the order they are read.
    """

    name: str
    files: list[SourceFile]
    filesystem: fs.FileSystem
    options: PrepareConfig

    @property
    def fingerprint(self) -> list[Any]:
        """Changes when the files change, without reading them; JSON-able."""
        if self.name == "docstrings":
            # The name of the cached corpus says what was harvested; when does not matter.
            return [Path(file.path).name for file in self.files]
        return [[file.path, file.bytes, file.mtime_ns] for file in self.files]

    def texts(self, counts: Counter[str] | None = None) -> Iterator[tuple[str | None, str]]:
        """(split, text) of every text that is more than white space, stripped, in order.

        Args:
            counts: `empty_texts` is counted in here.

        Raises:
            DataError: a file is not UTF-8, a JSON line is broken, or a field is missing; says where.
        """
        for file in self.files:
            for text in READERS[file.format](self.filesystem, file.path, self.options):
                stripped = text.strip()
                if stripped:
                    yield file.split, stripped
                elif counts is not None:
                    counts["empty_texts"] += 1


def open_source(name: str, options: PrepareConfig, cache_dir: Path) -> Source:
    """Find the files of a source.

    Args:
        cache_dir: where the docstring corpus is kept.

    Raises:
        DataError: nothing there, or nothing of a known kind.
    """
    if name == "docstrings" and options.format in ("auto", "docstrings"):
        filesystem, inner = resolve(harvest_docstrings(cache_dir).path)
        # The corpus is one sentence a line, whatever records the options ask of text files.
        options = options.model_copy(update={"record": "line"})
        return Source(name, [_file(filesystem.get_file_info(inner), "text", None)], filesystem, options)
    if options.format == "docstrings":
        raise DataError(
            f"format: docstrings reads no files, but the source is {name}. Use the source `docstrings` or another "
            "format."
        )
    filesystem, inner = resolve(name)
    try:
        info = filesystem.get_file_info(inner)
        files = _files(filesystem, info, name, options)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error}. Check the address and its permissions.") from None
    return Source(name if "://" in name else inner, files, filesystem, options)


def _files(filesystem: fs.FileSystem, info: fs.FileInfo, name: str, options: PrepareConfig) -> list[SourceFile]:
    if info.type == fs.FileType.NotFound:
        hint = "" if "://" in name else _near(Path(name))
        raise DataError(f"There is no source {name}.{hint} Give a file, a directory, a URL, or `docstrings`.")
    if info.type == fs.FileType.Directory:
        return _files_in(filesystem, info.path, name, options)
    return [_file(info, _format_of(name, info, options), None)]


def _files_in(filesystem: fs.FileSystem, folder: str, name: str, options: PrepareConfig) -> list[SourceFile]:
    for recursive in (False, True):
        listed = filesystem.get_file_info(fs.FileSelector(folder, recursive=recursive))
        known = [i for i in sorted(listed, key=lambda i: i.path) if i.is_file and _is_data(i.path[len(folder) :])]
        known = [i for i in known if options.format in ("auto", _FORMAT_OF_SUFFIX[_suffix(i.path)])]
        if known:
            break
    else:
        raise DataError(
            f"{name} holds no file of a known kind ({', '.join(_FORMAT_OF_SUFFIX)}; text and JSONL also with .gz). "
            "Files called train, valid and test are used as the splits."
        )
    splits = {info.path: _split_of(info.path) for info in known}
    if "train" not in splits.values():
        return [_file(info, _format_of(name, info, options), None) for info in known]
    _refuse_ambiguous(name, [path for path in splits if splits[path] is not None])
    return [
        _file(info, _format_of(name, info, options), splits[info.path])
        for info in known
        if splits[info.path] is not None
    ]


def _refuse_ambiguous(name: str, paths: list[str]) -> None:
    """Two different files for one split would silently be read one after the other."""
    first: dict[str, str] = {}
    for path in paths:
        split = str(_split_of(path))
        other = first.setdefault(split, path)
        if _word(other) != _word(path) or _ending(other) != _ending(path):
            raise DataError(
                f"{name} holds two versions of the {split} split, {Path(other).name} and {Path(path).name}. Move one "
                "away."
            )


def _file(info: fs.FileInfo, kind: str, split: str | None) -> SourceFile:
    return SourceFile(info.path, kind, split, info.size, info.mtime_ns or 0)


def _format_of(name: str, info: fs.FileInfo, options: PrepareConfig) -> str:
    if options.format != "auto":
        return options.format
    suffix = _suffix(info.path)
    if suffix not in _FORMAT_OF_SUFFIX:
        raise DataError(
            f"The name of {name} does not say what it holds (known: {', '.join(_FORMAT_OF_SUFFIX)}, with or without "
            ".gz). Set prepare.format to text, jsonl or parquet."
        )
    return _FORMAT_OF_SUFFIX[suffix]


def _is_data(relative: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in Path(relative).parts)
    return not hidden and _suffix(relative) in _FORMAT_OF_SUFFIX


def _suffix(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix.lower()


def _ending(path: str) -> str:
    return _suffix(path) + (".gz" if path.endswith(".gz") else "")


def _word(path: str) -> str | None:
    match = _SPLIT_NAME.fullmatch(Path(path.removesuffix(".gz")).stem.lower())
    return match.group(1) if match else None


def _split_of(path: str) -> str | None:
    word = _word(path)
    return _SPLIT_OF_WORD[word] if word else None


def _near(path: Path) -> str:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=3)
    return f" Did you mean {' or '.join(str(path.parent / n) for n in near)}?" if near else ""
