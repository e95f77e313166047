"""Hugging Face `datasets` folders as `save_to_disk` leaves them, read through that package, an optional extra."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import fs

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source.parquet import check_column
from vae_dist.data.source.pieces import Piece, Record, SourceFile, whole
from vae_dist.errors import DataError

_ROWS = 4096


def saved_datasets(filesystem: fs.FileSystem, folder: str) -> list[tuple[str | None, SourceFile]] | None:
    """(name, dataset) of the datasets in a folder: one without a name, or those of a DatasetDict; None for no such
    folder. The files have no split yet."""
    names: list[str | None] = [None]
    if _exists(filesystem, f"{folder}/dataset_dict.json"):
        with filesystem.open_input_stream(f"{folder}/dataset_dict.json") as stream:
            try:
                names = list(json.loads(stream.read())["splits"])
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{folder}/dataset_dict.json names no splits. Save the dataset again.") from None
    elif not _exists(filesystem, f"{folder}/state.json"):
        return None
    found = []
    for name in names:
        path = folder if name is None else f"{folder}/{name}"
        files = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        tables = [file for file in files if file.path.endswith(".arrow")]
        size, mtime_ns = sum(file.size for file in tables), max((file.mtime_ns or 0 for file in files), default=0)
        found.append((name, SourceFile(path, "datasets", None, size, mtime_ns)))
    return found


def read_dataset(filesystem: fs.FileSystem, piece: Piece, options: PrepareConfig) -> Iterator[Record]:
    """The text column of a range of rows; null is an empty text."""
    dataset, column = _load(filesystem, piece.path), options.text_field
    check_column(dataset.features.arrow_schema, piece.path, column)
    stop = len(dataset) if piece.stop is None else piece.stop
    try:
        rows = dataset.select_columns([column]).select(range(piece.start, stop)).with_format("arrow")
        for table in rows.iter(_ROWS):
            for value in table.column(0).to_pylist():
                yield None, value or ""
    except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise DataError(f"{piece.path} cannot be read: {error}. Save the dataset again.") from None


def cut_rows(filesystem: fs.FileSystem, file: SourceFile, options: PrepareConfig, target_bytes: int) -> list[Piece]:
    """Equal ranges of rows."""
    count = -(-file.bytes // target_bytes)
    if count < 2:
        return [whole(file)]
    rows = len(_load(filesystem, file.path))
    bounds = [i * rows // count for i in range(count + 1)]
    return [
        Piece(file.path, file.format, file.split, start, stop, file.bytes // count)
        for start, stop in itertools.pairwise(bounds)
        if start < stop
    ]


def _load(filesystem: fs.FileSystem, path: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{path} is a Hugging Face dataset, and the package that reads it is not installed. Install it with "
            "`pip install 'vae_dist[datasets]'`."
        ) from None
    if not isinstance(filesystem, fs.LocalFileSystem):
        raise DataError(f"{path} is a Hugging Face dataset in an object store. Copy the folder to a disk first.")
    try:
        return datasets.load_from_disk(path)
    except Exception as error:  # json, Arrow, or a feature type that the installed version does not know
        raise DataError(
            f"{path} is not a dataset that `datasets` {datasets.__version__} can read: {error}. Save it again."
        ) from None


def _exists(filesystem: fs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(path).is_file)
