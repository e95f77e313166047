"""What one worker reads: a file, or a part of one, and how files are cut and packed into such parts.

The cut depends on the files and the wished-for size alone, never on the number of workers, so the order of the texts
is the same however many read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pyarrow import fs

from vae_dist.config.schema import PrepareConfig


@dataclass(frozen=True)
class SourceFile:
    """One file (or Hugging Face dataset folder), its format, and the split its name says (None: decided by hash)."""

    path: str
    format: str
    split: str | None
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Piece:
    """A part of a file that can be read alone; the pieces of a file hold each of its records once.

    Attributes:
        split: as of the file.
        start, stop: bytes of text and JSONL, row groups of Parquet, rows of a Hugging Face dataset; stop None is the
            end. Formats that cannot be cut are one piece from 0 to None.
        bytes: about how much is read; a piece of Parquet counts its text column, decompressed.
    """

    path: str
    format: str
    split: str | None
    start: int
    stop: int | None
    bytes: int


Record = tuple[str | None, str]
"""(group, text): texts of one group, such as the captions of one image, belong in one split; None is no group."""
Reader = Callable[[fs.FileSystem, Piece, PrepareConfig], Iterator[Record]]
Cutter = Callable[[fs.FileSystem, SourceFile, PrepareConfig, int], list[Piece]]


def whole(file: SourceFile) -> Piece:
    """The file as one piece."""
    return Piece(file.path, file.format, file.split, 0, None, file.bytes)


def cut_bytes(filesystem: fs.FileSystem, file: SourceFile, options: PrepareConfig, target_bytes: int) -> list[Piece]:
    """Equal ranges of bytes, of a file that is not compressed."""
    count = 1 if file.path.endswith(".gz") else -(-file.bytes // target_bytes)
    if count < 2:
        return [whole(file)]
    bounds = [i * file.bytes // count for i in range(count + 1)]
    # The last piece is open: it reads to the end, wherever that is by then.
    stops = [*bounds[1:-1], None]
    return [
        Piece(file.path, file.format, file.split, start, stop, end - start)
        for start, stop, end in zip(bounds[:-1], stops, bounds[1:], strict=True)
    ]


def keep_whole(filesystem: fs.FileSystem, file: SourceFile, options: PrepareConfig, target_bytes: int) -> list[Piece]:
    """No cut: what stands in one place depends on what stood before."""
    return [whole(file)]


def cut_units(file: SourceFile, sizes: list[int], target_bytes: int) -> list[Piece]:
    """Runs of neighbouring units (row groups) of about `target_bytes`, which is exceeded by no more than a unit.

    Args:
        sizes: bytes of each unit.
    """
    pieces: list[Piece] = []
    start = size = 0
    for unit, unit_bytes in enumerate(sizes):
        size += unit_bytes
        if size >= target_bytes and unit + 1 < len(sizes):
            pieces.append(Piece(file.path, file.format, file.split, start, unit + 1, size))
            start, size = unit + 1, 0
    return [*pieces, Piece(file.path, file.format, file.split, start, None, size)]


def pack(pieces: Iterable[Piece], target_bytes: int) -> list[list[Piece]]:
    """Neighbours together up to `target_bytes`, in order; every piece in one group."""
    groups: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not groups or size + piece.bytes > target_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.bytes
    return groups
