r"""The lines of a UTF-8 file from any byte on, decompressed where the name ends in .gz.

A file is cut at any byte, and every line still belongs to exactly one piece: the one that holds its first byte. What
is longer than a line (a paragraph, a document) belongs to the piece that holds its marker line.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import BinaryIO, cast

from pyarrow import fs

from vae_dist.data.source.pieces import Piece
from vae_dist.errors import DataError

_READ_BYTES = 1 << 20


def read_lines(filesystem: fs.FileSystem, path: str, start: int = 0) -> Iterator[tuple[int, str]]:
    r"""(offset, line) of the lines whose first byte is at `start` or later; no byte order mark at the file's start.

    Only \n ends a line, and it is taken off; a \r before it is left to strip. Nothing after the last \n is no line.

    Raises:
        DataError: the file cannot be read or is not UTF-8; names the byte and its offset.
    """
    # The byte before tells whether a line begins at `start`.
    offset = max(start - 1, 0)
    is_inside = start == 0
    parts: list[bytes] = []
    for block in read_blocks(filesystem, path, offset):
        *ends, rest = block.split(b"\n")
        for end in ends:
            raw = b"".join([*parts, end]) if parts else end
            parts = []
            if is_inside:
                yield offset, _decoded(raw, path, offset)
            is_inside = True
            offset += len(raw) + 1
        parts.append(rest)
    if is_inside and (raw := b"".join(parts)):
        yield offset, _decoded(raw, path, offset)


def lines_of(filesystem: fs.FileSystem, piece: Piece) -> Iterator[tuple[int, str]]:
    """(offset, line) of the lines that belong to `piece`."""
    for offset, line in read_lines(filesystem, piece.path, piece.start):
        if piece.stop is not None and offset >= piece.stop:
            return
        yield offset, line


def lines_with_next(filesystem: fs.FileSystem, piece: Piece) -> Iterator[tuple[int, str, str]]:
    """(offset, line, next line) from the start of `piece` to the end of the file, which an empty line follows."""
    before: tuple[int, str] | None = None
    for offset, line in read_lines(filesystem, piece.path, piece.start):
        if before is not None:
            yield *before, line
        before = offset, line
    if before is not None:
        yield *before, ""


def lines_by_marker(
    filesystem: fs.FileSystem, piece: Piece, is_marker: Callable[[str, str], bool]
) -> Iterator[tuple[str, str]]:
    """The marker lines that belong to `piece`, each with what follows it up to the next marker.

    The start of the file is a marker, too.

    Args:
        is_marker: of a line and the next one.

    Yields:
        A line and the next one.
    """
    is_owned = piece.start == 0
    for offset, line, following in lines_with_next(filesystem, piece):
        is_beyond = piece.stop is not None and offset >= piece.stop
        if is_beyond and not is_owned:
            return
        if is_marker(line, following):
            if is_beyond:
                return
            is_owned = True
        if is_owned:
            yield line, following


def read_blocks(filesystem: fs.FileSystem, path: str, start: int = 0) -> Generator[bytes, None, None]:
    """The bytes of a file, decompressed, from `start` on.

    Raises:
        DataError: the file is not there, not readable, or its compressed data are damaged or cut short.
    """
    with ExitStack() as stack:
        try:
            if start:
                raw = stack.enter_context(filesystem.open_input_file(path))
                raw.seek(start)
            else:
                raw = stack.enter_context(filesystem.open_input_stream(path, compression=None))
            stream = cast(BinaryIO, raw)
            if path.endswith((".gz", ".tgz")):
                stream = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=stream, mode="rb")))
            while block := stream.read(_READ_BYTES):
                yield block
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path} cannot be read to its end: {error}. Check its permissions, or copy or compress it again."
            ) from None


def decode_utf8(raw: bytes, path: str, offset: int, inside: str = "") -> str:
    """`raw`, which stands at `offset` of `path`, as text.

    Args:
        inside: what the offset counts in, when that is not the file itself.

    Raises:
        DataError: it is not UTF-8; names the byte and its offset.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}{inside}. Convert it, "
            "for instance with `iconv -f LATIN1 -t UTF-8`."
        ) from None


def _decoded(raw: bytes, path: str, offset: int) -> str:
    text = decode_utf8(raw, path, offset, " of the decompressed text" if path.endswith(".gz") else "")
    return text if offset else text.removeprefix("\ufeff")
