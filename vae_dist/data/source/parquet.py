"""Texts in a column of a Parquet file, cut by row groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.dataset
from pyarrow import fs

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source.pieces import Piece, Record, SourceFile, cut_units, whole
from vae_dist.errors import DataError

_ROWS = 4096


def read_parquet(filesystem: fs.FileSystem, piece: Piece, options: PrepareConfig) -> Iterator[Record]:
    """The text column, batch by batch; null is an empty text."""
    column, row = options.text_field, 0
    with _readable(piece.path):
        fragment = _fragment(filesystem, piece.path, column)
        groups = [group.id for group in fragment.row_groups][piece.start : piece.stop]
        if not groups:
            return
        # Little read-ahead: texts may be long, and reading is not what takes the time.
        batches = fragment.subset(row_group_ids=groups).to_batches(
            columns=[column], batch_size=_ROWS, batch_readahead=2, fragment_readahead=1
        )
        try:
            for batch in batches:
                for value in batch.column(0).to_pylist():
                    yield None, value or ""
                row += batch.num_rows
        except UnicodeDecodeError:
            from_group = f" of row group {piece.start}" if piece.start else ""
            raise DataError(
                f"{piece.path}: column {column!r} is not UTF-8 in the {_ROWS} rows from row {row}{from_group} on. "
                "Write the file again."
            ) from None


def cut_row_groups(
    filesystem: fs.FileSystem, file: SourceFile, options: PrepareConfig, target_bytes: int
) -> list[Piece]:
    """Runs of row groups; a file that is small enough is not looked into."""
    if file.bytes <= target_bytes:
        return [whole(file)]
    with _readable(file.path):
        metadata = _fragment(filesystem, file.path, options.text_field).metadata
        sizes = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            sizes.append(sum(c.total_uncompressed_size for c in columns if c.path_in_schema == options.text_field))
    return cut_units(file, sizes, target_bytes)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}. Check or restore the file.") from None


def _fragment(filesystem: fs.FileSystem, path: str, column: str) -> pyarrow.dataset.ParquetFileFragment:
    fragment = pyarrow.dataset.ParquetFileFormat().make_fragment(path, filesystem)
    check_column(fragment.physical_schema, path, column)
    return fragment


def check_column(schema: pa.Schema, path: str, name: str) -> None:
    """Refuse a table without a text column of that name."""
    if name not in schema.names:
        raise DataError(
            f"{path} has no column {name!r} (it has: {', '.join(schema.names)}). Set prepare.text_field to the one "
            "that holds the text."
        )
    kind = schema.field(name).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise DataError(f"{path}: column {name!r} holds {kind}, not text. Set prepare.text_field to a string column.")
