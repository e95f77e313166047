"""WikiText's token files, and sentences of tokenised text.

An article begins with ` = Title = `; ` = = Section = = ` and deeper ones are headings inside it. An empty line follows
a heading, and none follows a formula that looks like one. Headings are markup and belong to no text.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyarrow import fs

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source.lines import lines_by_marker, lines_with_next
from vae_dist.data.source.pieces import Piece, Record

_ENDS = frozenset(".?!")
_CLOSING = frozenset({")", "]", "''", "”", "’"})


def read_wikitext(filesystem: fs.FileSystem, piece: Piece, options: PrepareConfig) -> Iterator[Record]:
    """Documents (an article's paragraphs joined with a space), paragraphs (record: line) or sentences."""
    if options.record != "document":
        for offset, line, following in lines_with_next(filesystem, piece):
            if piece.stop is not None and offset >= piece.stop:
                return
            if line.strip() and not heading_level(line, following):
                texts = sentences(line) if options.record == "sentence" else [line]
                yield from ((None, text) for text in texts)
        return
    paragraphs: list[str] = []
    for line, following in lines_by_marker(filesystem, piece, lambda *lines: heading_level(*lines) == 1):
        level = heading_level(line, following)
        if level == 1 and paragraphs:
            yield None, " ".join(paragraphs)
            paragraphs = []
        if level == 0 and line.strip():
            paragraphs.append(line.strip())
    if paragraphs:
        yield None, " ".join(paragraphs)


def heading_level(line: str, following: str) -> int:
    """1 for a title, 2 and more for the headings of sections, 0 for any other line.

    Args:
        following: the next line; an empty one at the end of the file.
    """
    # Most lines are settled by their first characters.
    if not line.lstrip().startswith("= ") or following.strip():
        return 0
    tokens = line.split()
    level = next((i for i, token in enumerate(tokens) if token != "="), len(tokens))
    is_closed = len(tokens) > 2 * level and set(tokens[-level:]) == {"="} and tokens[-level - 1] != "="
    return level if is_closed else 0


def sentences(line: str) -> Iterator[str]:
    """The sentences of a tokenised line: each ends at a token `.`, `?` or `!` and takes closing marks with it.

    A `"` after the end is closing when the sentence holds an odd number of them before it.
    """
    sentence: list[str] = []
    has_ended = is_quoted = False
    for token in line.split():
        if has_ended and not (token in _ENDS or token in _CLOSING or (token == '"' and is_quoted)):
            yield " ".join(sentence)
            sentence, has_ended, is_quoted = [], False, False
        sentence.append(token)
        has_ended = has_ended or token in _ENDS
        is_quoted ^= token == '"'
    if sentence:
        yield " ".join(sentence)
