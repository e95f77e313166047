"""Image captions: the JSON of the COCO annotations, and tab-separated files of image and caption.

One caption is one text. All captions of an image are one group, so that splitting by hash keeps them together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

from pyarrow import fs

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source.lines import decode_utf8, lines_of, read_blocks
from vae_dist.data.source.pieces import Piece, Record
from vae_dist.data.source.text_field import text_of
from vae_dist.errors import DataError

_IMAGE_COLUMNS = ("image", "image_id", "image_name", "file_name", "filename")


def read_captions_json(filesystem: fs.FileSystem, piece: Piece, options: PrepareConfig) -> Iterator[Record]:
    """The captions of `{"annotations": [{"caption": ..., "image_id": ...}, ...]}`, which is read as a whole."""
    path = piece.path
    text = decode_utf8(b"".join(read_blocks(filesystem, path)), path, 0).removeprefix("\ufeff")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}. Copy it again.") from None
    del text
    annotations = tree.get("annotations") if isinstance(tree, dict) else None
    if not isinstance(annotations, list):
        raise DataError(
            f"{path} holds no captions: there is no list `annotations` in it. Give one of COCO's captions_*.json, or "
            "JSON objects one a line with prepare.format jsonl."
        )
    for number, annotation in enumerate(annotations):
        caption = text_of(annotation, f"{path}: annotation {number}", "caption", "Give one of COCO's captions_*.json.")
        image = annotation.get("image_id")
        yield (None if image is None else f"image {image}"), caption


def read_captions_tsv(filesystem: fs.FileSystem, piece: Piece, options: PrepareConfig) -> Iterator[Record]:
    r"""Lines `image.jpg#0<tab>caption`, or columns named by a header row; quotes are taken as they stand.

    A header row has a column `caption` (or `prepare.text_field`); a column such as `image` or `image_id` names the
    image. `#0`, `#1` and so on after it number the captions of one image.
    """
    columns: _Columns | None = None
    for number, (_, line) in enumerate(lines_of(filesystem, piece), 1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        if columns is None:
            columns = _named_columns(fields, options)
            if columns is not None:
                continue
            columns = _Columns(2, caption=1, image=0)
        if len(fields) != columns.width:
            raise DataError(
                f"{piece.path}:{number} has {len(fields)} tab-separated fields instead of {columns.width}. Mend or "
                "remove the line; columns other than image and caption need a header row that names them."
            )
        image = None if columns.image is None else f"image {fields[columns.image].partition('#')[0]}"
        yield image, fields[columns.caption]


class _Columns(NamedTuple):
    width: int
    caption: int
    image: int | None


def _named_columns(fields: list[str], options: PrepareConfig) -> _Columns | None:
    """The columns as a header row names them; None when it is no header."""
    names = [field.strip().lower() for field in fields]
    caption = next((name for name in ("caption", options.text_field.lower()) if name in names), None)
    if caption is None:
        return None
    image = next((names.index(name) for name in _IMAGE_COLUMNS if name in names), None)
    return _Columns(len(names), names.index(caption), image)
