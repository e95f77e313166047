"""Files to texts: a table of formats, and the plain ones, lines, paragraphs and JSONL.

A format is a reader, which streams the texts of a piece of a file and names file and place of what is broken, and a
cutter, which says where a file may be cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from pyarrow import fs

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source.captions import read_captions_json, read_captions_tsv
from vae_dist.data.source.huggingface import cut_rows, read_dataset
from vae_dist.data.source.lines import lines_by_marker, lines_of
from vae_dist.data.source.parquet import cut_row_groups, read_parquet
from vae_dist.data.source.pieces import Cutter, Piece, Reader, Record, cut_bytes, keep_whole
from vae_dist.data.source.text_field import text_of
from vae_dist.data.source.text_tar import read_tar
from vae_dist.data.source.wikitext import read_wikitext, sentences
from vae_dist.errors import DataError


def read_text(filesystem: fs.FileSystem, piece: Piece, options: PrepareConfig) -> Iterator[Record]:
    """A text a line, a sentence of a line, or a paragraph: lines up to an empty one, stripped and joined."""
    if options.record != "paragraph":
        for _, line in lines_of(filesystem, piece):
            if options.record == "line":
                yield None, line
            else:
                yield from ((None, sentence) for sentence in sentences(line))
        return
    paragraph: list[str] = []
    for line, _ in lines_by_marker(filesystem, piece, lambda line, _: not line.strip()):
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            yield None, " ".join(paragraph)
            paragraph = []
    if paragraph:
        yield None, " ".join(paragraph)


def read_jsonl(filesystem: fs.FileSystem, piece: Piece, options: PrepareConfig) -> Iterator[Record]:
    """The text field of every line's object; null is an empty text."""
    for number, (offset, line) in enumerate(lines_of(filesystem, piece), 1):
        if not line.strip():
            continue
        # Lines before the piece are not counted.
        where = f"{piece.path}:{number} at byte {offset}" if piece.start == 0 else f"{piece.path} at byte {offset}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not a JSON object: {error}. Mend or remove the line.") from None
        yield None, text_of(record, where, options.text_field)


FORMATS: dict[str, tuple[Reader, Cutter]] = {
    "text": (read_text, cut_bytes),
    "wikitext": (read_wikitext, cut_bytes),
    "jsonl": (read_jsonl, cut_bytes),
    "parquet": (read_parquet, cut_row_groups),
    "tar": (read_tar, keep_whole),
    "captions_json": (read_captions_json, keep_whole),
    "captions_tsv": (read_captions_tsv, keep_whole),
    "datasets": (read_dataset, cut_rows),
}
