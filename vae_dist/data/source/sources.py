"""Where text comes from: a source yields (split, text) pairs in a fixed order, reading as it goes.

Kinds: the docstring corpus; text files (a sequence a line, a sentence or a paragraph), WikiText and JSONL, all gzip
too; Parquet; tar archives of text; image captions; Hugging Face datasets on disk. All but the first and the last may
lie in an object store. A folder with train, valid and test files brings its own split; otherwise the split is None
and decided by a hash of the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from pyarrow import fs

from vae_dist.config.checks import record_problem
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source.docstrings import harvest_docstrings
from vae_dist.data.source.pieces import Piece, SourceFile, pack, whole
from vae_dist.data.source.records import FORMATS
from vae_dist.data.source.source_files import as_source_file, find_files
from vae_dist.data.store.filesystem import resolve
from vae_dist.data.text.normalise import keyword_filter, normaliser
from vae_dist.errors import DataError


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

    def pieces(self, target_bytes: int) -> list[list[Piece]]:
        """What workers read: groups of about `target_bytes` in source order, together every text once.

        Big files are cut and small ones packed together. The groups depend on the files and the target alone.

        Raises:
            DataError: a file that has to be looked into to be cut (Parquet) is not readable.
        """
        cut = (FORMATS[file.format][1](self.filesystem, file, self.options, target_bytes) for file in self.files)
        return pack((piece for pieces in cut for piece in pieces), target_bytes)

    def read(self, piece: Piece, counts: Counter[str]) -> Iterator[tuple[str | None, str]]:
        """(split, text) of every text of a piece, normalised, that is more than white space; in order.

        Args:
            counts: `empty_texts`, and `filtered_texts` that lack the keyword, are counted in here.

        Raises:
            DataError: a file is not UTF-8, a JSON line is broken, or a field is missing; says where.
        """
        options = self.options
        normalise, has_keyword = normaliser(options), keyword_filter(options.keyword)
        for group, original in FORMATS[piece.format][0](self.filesystem, piece, options):
            text = normalise(original)
            if not text:
                counts["empty_texts"] += 1
            elif has_keyword is not None and not has_keyword(original):
                counts["filtered_texts"] += 1
            else:
                yield piece.split or (None if group is None else split_of(group, options)), text

    def texts(self, counts: Counter[str] | None = None) -> Iterator[tuple[str | None, str]]:
        """What `read` gives of all files, one after the other."""
        for file in self.files:
            yield from self.read(whole(file), Counter() if counts is None else counts)


def split_of(key: str, options: PrepareConfig) -> str:
    """The split a text (or a group of texts) belongs to by its hash: the same one is always in the same split."""
    share = xxhash.xxh3_64_intdigest(key.encode()) / 2**64
    if share < options.test_fraction:
        return "test"
    return "valid" if share < options.test_fraction + options.valid_fraction else "train"


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
        return Source(name, [as_source_file(filesystem.get_file_info(inner), "text", None)], filesystem, options)
    if options.format == "docstrings":
        raise DataError(
            f"format: docstrings reads no files, but the source is {name}. Use the source `docstrings` or another "
            "format."
        )
    filesystem, inner = resolve(name)
    try:
        files = find_files(filesystem, inner, name, options)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error}. Check the address and its permissions.") from None
    for file in files:
        if problem := record_problem(file.format, options.record):
            raise DataError(f"{file.path} is {file.format}. {problem}")
    return Source(name if "://" in name else inner, files, filesystem, options)
