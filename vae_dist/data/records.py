"""Files to texts: lines, paragraphs, JSONL and Parquet, streamed; broken input is named by file and place."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.dataset
from pyarrow import fs

from vae_dist.config.schema import PrepareConfig
from vae_dist.errors import DataError

_READ_BYTES = 1 << 20
_PARQUET_ROWS = 4096


def read_text(filesystem: fs.FileSystem, path: str, options: PrepareConfig) -> Iterator[str]:
    """A text a line, or a paragraph: lines up to an empty one, stripped and joined with a space."""
    if options.record == "line":
        yield from read_lines(filesystem, path)
        return
    paragraph: list[str] = []
    for line in read_lines(filesystem, path):
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            yield " ".join(paragraph)
            paragraph = []
    if paragraph:
        yield " ".join(paragraph)


def read_jsonl(filesystem: fs.FileSystem, path: str, options: PrepareConfig) -> Iterator[str]:
    """The text field of every line's object; null is an empty text."""
    for number, line in enumerate(read_lines(filesystem, path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not a JSON object: {error}. Mend or remove the line.") from None
        yield _text_of(record, where, options.text_field)


def read_parquet(filesystem: fs.FileSystem, path: str, options: PrepareConfig) -> Iterator[str]:
    """The text column, batch by batch; null is an empty text."""
    column, row = options.text_field, 0
    try:
        table = pyarrow.dataset.dataset(path, format="parquet", filesystem=filesystem)
        _check_column(table.schema, path, column)
        # Little read-ahead: texts may be long, and reading is not what takes the time.
        for batch in table.to_batches([column], batch_size=_PARQUET_ROWS, batch_readahead=2, fragment_readahead=1):
            for value in batch.column(0).to_pylist():
                yield value or ""
            row += batch.num_rows
    except UnicodeDecodeError:
        raise DataError(
            f"{path}: column {column!r} is not UTF-8 in the {_PARQUET_ROWS} rows from row {row} on. Write the file "
            "again."
        ) from None
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}. Check or restore the file.") from None


Reader = Callable[[fs.FileSystem, str, PrepareConfig], Iterator[str]]
READERS: dict[str, Reader] = {"text": read_text, "jsonl": read_jsonl, "parquet": read_parquet}


def read_lines(filesystem: fs.FileSystem, path: str) -> Iterator[str]:
    r"""Lines of a UTF-8 file without their \n, the only character that ends a line; a \r before it is left to strip.

    Raises:
        DataError: the file cannot be read or is not UTF-8; names the byte and its offset.
    """
    parts: list[str] = []
    for text in _decoded(filesystem, path):
        *whole, rest = text.split("\n")
        for end in whole:
            yield "".join([*parts, end])
            parts = []
        parts.append(rest)
    # Nothing after the last \n is no line.
    if last := "".join(parts):
        yield last


def _decoded(filesystem: fs.FileSystem, path: str) -> Iterator[str]:
    """The text of a file piece by piece, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, at_start = 0, True
    for block in _blocks(filesystem, path):
        # Bytes of a character that the last block cut in two are decoded with this one.
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at, byte = offset - pending + error.start, error.object[error.start]
            inside = " of the decompressed text" if path.endswith(".gz") else ""
            raise DataError(
                f"{path} is not UTF-8: byte 0x{byte:02x} at offset {at}{inside}. Convert it, for instance with "
                "`iconv -f LATIN1 -t UTF-8`."
            ) from None
        offset += len(block)
        yield text.removeprefix("\ufeff") if at_start else text
        at_start = at_start and not text


def _blocks(filesystem: fs.FileSystem, path: str) -> Iterator[bytes]:
    """The bytes of a file, decompressed; the last block is empty."""
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(filesystem.open_input_stream(path, compression=None))
            stream = cast(BinaryIO, raw)
            if path.endswith(".gz"):
                stream = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=stream, mode="rb")))
            while block := stream.read(_READ_BYTES):
                yield block
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path} cannot be read to its end: {error}. Check its permissions, or copy or compress it again."
            ) from None
        yield b""


def _text_of(record: Any, where: str, name: str) -> str:
    if not isinstance(record, dict) or name not in record:
        fields = ", ".join(record) if isinstance(record, dict) else f"no object but {type(record).__name__}"
        raise DataError(
            f"{where} has no field {name!r} (it has: {fields}). Set prepare.text_field to the one that holds the text."
        )
    text = record[name]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: field {name!r} is no string but {type(text).__name__}. Mend or remove the line.")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {name!r} holds half of a surrogate pair, \\u{ord(error.object[error.start]):04x}, which "
            "is no character. Mend or remove the line."
        ) from None
    return text or ""


def _check_column(schema: pa.Schema, path: str, name: str) -> None:
    if name not in schema.names:
        raise DataError(
            f"{path} has no column {name!r} (it has: {', '.join(schema.names)}). Set prepare.text_field to the one "
            "that holds the text."
        )
    kind = schema.field(name).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise DataError(f"{path}: column {name!r} holds {kind}, not text. Set prepare.text_field to a string column.")
