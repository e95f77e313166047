r"""The lines of a piece of a text file, many at a time: what `lines_of` gives, stripped, for a tenth of the time.

Reading line by line takes longer than hashing the lines, and a third of what tokenising them takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pyarrow import fs

from vae_dist.data.source.lines import decode_utf8, read_blocks
from vae_dist.data.source.pieces import Piece


def line_batches(filesystem: fs.FileSystem, piece: Piece, counts: Counter[str]) -> Iterator[list[str]]:
    r"""The lines that belong to `piece`, without white space at their ends; those that are empty are counted.

    A line belongs to the piece that holds its first byte. Only \n ends one.

    Args:
        counts: `empty_texts` is counted in here.

    Raises:
        DataError: the file cannot be read or is not UTF-8; names the byte and its offset.
    """
    inside = " of the decompressed text" if piece.path.endswith(".gz") else ""
    for offset, body in _whole_lines(filesystem, piece):
        text = decode_utf8(body, piece.path, offset, inside)
        lines = (text if offset else text.removeprefix("\ufeff")).split("\n")
        if text.endswith("\n"):
            # Nothing after the last \n is no line.
            lines.pop()
        stripped = [line for line in map(str.strip, lines) if line]
        counts["empty_texts"] += len(lines) - len(stripped)
        yield stripped


def _whole_lines(filesystem: fs.FileSystem, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of runs of whole lines of the piece."""
    # The byte before tells whether a line begins at `start`.
    offset = max(piece.start - 1, 0)
    is_inside = piece.start == 0
    parts: list[bytes] = []
    for block in read_blocks(filesystem, piece.path, offset):
        end = block.rfind(b"\n") + 1
        if not end:
            parts.append(block)
            continue
        body = b"".join([*parts, block[:end]])
        parts = [block[end:]]
        begin = 0 if is_inside else body.find(b"\n") + 1
        is_inside = True
        # The last line of the piece ends at the first \n that is not before its last byte.
        if piece.stop is not None and offset + len(body) >= piece.stop:
            stop = body.find(b"\n", max(begin, piece.stop - 1 - offset)) + 1
            if offset + begin < piece.stop:
                yield offset + begin, body[begin:stop]
            return
        if begin < len(body):
            yield offset + begin, body[begin:]
        offset += len(body)
    rest = b"".join(parts)
    if is_inside and rest and (piece.stop is None or offset < piece.stop):
        yield offset, rest
