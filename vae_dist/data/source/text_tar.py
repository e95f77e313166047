"""WebDataset archives of text: tar files whose samples have a .txt member, or a .json member with a text field."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import IO, cast

from pyarrow import fs

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source.lines import decode_utf8, read_blocks
from vae_dist.data.source.pieces import Piece, Record
from vae_dist.data.source.text_field import text_of
from vae_dist.errors import DataError

_READ_BYTES = 1 << 20


def read_tar(filesystem: fs.FileSystem, piece: Piece, options: PrepareConfig) -> Iterator[Record]:
    """The texts of each sample, which are neighbouring members with one name up to its first dot.

    The .txt members are texts; where there is none, so is the text field of the .json members. Other members, such
    as images, are passed over. Several texts of one sample are one group.
    """
    key: str | None = None
    sample: list[tuple[str, bytes, int]] = []
    has_text = False
    for name, raw, offset in _text_members(filesystem, piece.path):
        has_text = True
        folder, slash, base = name.rpartition("/")
        this = folder + slash + base.partition(".")[0]
        if this != key:
            yield from _texts(key, sample, piece.path, options)
            key, sample = this, []
        sample.append((name, raw, offset))
    yield from _texts(key, sample, piece.path, options)
    if not has_text:
        raise DataError(f"{piece.path} holds no .txt and no .json member. Give a WebDataset archive of text.")


def _texts(
    key: str | None, sample: list[tuple[str, bytes, int]], path: str, options: PrepareConfig
) -> Iterator[Record]:
    plain = [member for member in sample if member[0].endswith(".txt")]
    group = key if len(plain or sample) > 1 else None
    for name, raw, offset in plain or sample:
        text = decode_utf8(raw, f"{path}: member {name}", offset, " of the archive").removeprefix("\ufeff")
        if plain:
            yield group, text
            continue
        where = f"{path}: member {name} at byte {offset}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not a JSON object: {error}. Mend or remove the member.") from None
        yield group, text_of(record, where, options.text_field)


def _text_members(filesystem: fs.FileSystem, path: str) -> Iterator[tuple[str, bytes, int]]:
    """(name, bytes, offset of the bytes) of the .txt and .json members.

    Raises:
        DataError: the archive is damaged or cut short, also where `tarfile` takes the damage for its end.
    """
    blocks = read_blocks(filesystem, path)
    offset = 0
    try:
        stream = cast(IO[bytes], _Stream(blocks))
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_READ_BYTES, tarinfo=_StrictMember) as archive:
            while (member := archive.next()) is not None:
                # They would be kept, and there may be millions.
                archive.members = []  # type: ignore[attr-defined]
                base = member.name.rpartition("/")[2]
                if member.isfile() and base.endswith((".txt", ".json")) and not base.startswith("."):
                    content = archive.extractfile(member)
                    assert content is not None
                    yield member.name, content.read(), member.offset_data
                offset = archive.offset
            _refuse_rest(cast(IO[bytes], archive.fileobj))
    except tarfile.TarError as error:
        raise DataError(f"{path} is damaged after byte {offset}: {error}. Copy or write the archive again.") from None
    finally:
        blocks.close()


def _refuse_rest(stream: IO[bytes]) -> None:
    """After the zero block that ends an archive there may be nothing but zeros, such as a second archive."""
    while block := stream.read(_READ_BYTES):
        if block.count(0) != len(block):
            raise tarfile.ReadError("data follow the end of the archive")


class _StrictMember(tarfile.TarInfo):
    """`tarfile` takes a header it cannot read for the end of the archive; only a zero block is one."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictMember:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf.count(0) == tarfile.BLOCKSIZE:
                raise
            what = "it ends without a zero block" if len(buf) < tarfile.BLOCKSIZE else str(error)
            raise tarfile.ReadError(what) from None


class _Stream:
    """What `tarfile` asks of a file that is read once: `read`, of any number of bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks

    def read(self, _: int) -> bytes:
        return next(self._blocks, b"")
