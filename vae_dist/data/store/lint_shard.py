"""One shard under the magnifying glass: file, tar, index rows and members, each looked at on its own.

Nothing that damaged bytes do to a reader ends the examination: whatever a reader raises becomes a `Problem`.
"""

from __future__ import annotations

import itertools
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from vae_dist.data.store.lint_member import RESTORE_SHARD, check_content, member_content
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.store.shards import TAR_BLOCK, MemberEntry, ShardEntry, entry_bytes, shard_name

_READ_BYTES = 1 << 22
RESTORE_TABLES = "Restore index.arrow and shards.arrow from a copy, or prepare the data again."


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        shard: file name; None when it is not about one shard.
        member: number in its split.
        offset: of the member's tar entry, bytes.
        what: the finding.
        fix: what to do.
    """

    shard: str | None
    member: int | None
    offset: int | None
    what: str
    fix: str

    def __str__(self) -> str:
        where = [self.shard] if self.shard is not None else []
        where += [f"member {self.member}"] if self.member is not None else []
        where += [f"byte {self.offset}"] if self.offset is not None else []
        return f"{', '.join(where)}{': ' if where else ''}{self.what}. {self.fix}"


Tell = Callable[[Problem], None]


@dataclass(frozen=True)
class Expected:
    """What the tables say of a shard.

    Attributes:
        first_member, first_sequence: numbers in the split; 0 where nobody knows.
        entry: its row of the shard table; None where that is lost.
        first_row: row of its first member in the index.
    """

    name: str
    split: str
    first_member: int = 0
    first_sequence: int = 0
    entry: ShardEntry | None = None
    first_row: int = 0


class Content(NamedTuple):
    """A member that is as it should be, or nearly."""

    number: int
    first_sequence: int
    sequences: Sequences
    docs: np.ndarray


class _Listed(NamedTuple):
    offset: int
    bytes: int
    name: str


def check_shard(
    file: BinaryIO,
    expected: Expected,
    members: list[MemberEntry] | None,
    schema: pa.Schema | None,
    vocab_size: int | None,
    tell: Tell,
) -> Iterator[Content]:
    """Tell every problem of a shard; yields the members whose bytes are sound, one in memory at a time.

    Args:
        members: its rows of the index; None where that is lost.
        schema, vocab_size: what members must have; None where nobody knows.
    """
    size = _check_file(file, expected, tell)
    listed, error = _listing(file)
    if error:
        tell(Problem(expected.name, None, None, error, RESTORE_SHARD))
    is_indexed, first = members is not None, expected.first_sequence
    if members is None:
        # The counts are not known: what a member holds is taken as it is.
        members = [MemberEntry(-1, one.offset, one.bytes, -1, -1, -1, -1) for one in listed]
    else:
        _check_rows(expected, members, size, tell)
        _check_listing(listed, expected, members, tell)
    for number, entry in enumerate(members, expected.first_member):

        def problem(what: str, fix: str, number: int = number, offset: int = entry.offset) -> None:
            tell(Problem(expected.name, number, offset, what, fix))

        first = entry.first_sequence if is_indexed else first
        data = _entry(file, entry, size)
        if is_indexed and (len(data) != entry.bytes or zlib.crc32(data) != entry.crc32):
            what = f"its {len(data)} of {entry.bytes} bytes do not match the checksum in the index"
            problem(what, RESTORE_SHARD)
        elif content := member_content(pa.py_buffer(data), schema, problem):
            check_content(*content, first, entry if is_indexed else None, vocab_size, problem)
            yield Content(number, first, *content)
            first += len(content[0])


def _check_file(file: BinaryIO, expected: Expected, tell: Tell) -> int:
    """Size and hash of the whole file; returns the size in bytes."""
    entry, what = expected.entry, None
    digest, size = xxhash.xxh3_128(), 0
    file.seek(0)
    while block := file.read(_READ_BYTES):
        digest.update(block)
        size += len(block)
    if entry is not None and size != entry.bytes:
        what = f"it has {size} bytes, but {entry.bytes} were written"
    elif entry is not None and digest.hexdigest() != entry.xxh3:
        what = "it is not the file that was written: its hash differs from that in shards.arrow"
    if what:
        tell(Problem(expected.name, None, None, what, RESTORE_SHARD))
    return size


def _listing(file: BinaryIO) -> tuple[list[_Listed], str | None]:
    """The entries that Python's tar reader finds, and what it says when it gives up."""
    found: list[_Listed] = []
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while info := tar.next():
                # A damaged size may be negative, and some versions of tarfile then go round in circles.
                if found and info.offset < found[-1].offset + TAR_BLOCK:
                    return found, f"a tar reader goes back from byte {found[-1].offset} to byte {info.offset}"
                size = info.offset_data - info.offset - TAR_BLOCK + entry_bytes(info.size)
                found.append(_Listed(info.offset, size, info.name))
    # Which errors damaged bytes provoke there is nowhere written down.
    except Exception as error:
        return found, f"a tar reader gives up after {len(found)} members: {type(error).__name__}: {error}"
    return found, None


def _check_listing(listed: list[_Listed], expected: Expected, members: list[MemberEntry], tell: Tell) -> None:
    """The tar reader finds the members that the index names; tells the first difference."""
    for i, (found, entry) in enumerate(itertools.zip_longest(listed, members)):
        number = expected.first_member + i
        if entry is None:
            what = f"a tar reader finds {found.name} at byte {found.offset}, which the index does not name"
            tell(Problem(expected.name, None, found.offset, what, RESTORE_SHARD))
            return
        name = f"{expected.split}-{entry.shard:06d}-{number:08d}.arrow"
        if found is None:
            what = f"a tar reader does not find it: it stops after {len(listed)} of {len(members)} members"
        elif found != (entry.offset, entry.bytes, name):
            what = f"a tar reader finds {found.name!r} with {found.bytes} bytes at byte {found.offset}; the index says "
            what += f"{name} with {entry.bytes} bytes at byte {entry.offset}"
        else:
            continue
        tell(Problem(expected.name, number, entry.offset, what, RESTORE_SHARD))
        return


def _check_rows(expected: Expected, members: list[MemberEntry], size: int, tell: Tell) -> None:
    """The rows of the two tables agree: counts, neighbours, numbers."""
    entry = expected.entry
    assert entry is not None

    def problem(what: str, number: int | None = None, offset: int | None = None) -> None:
        tell(Problem(expected.name, number, offset, what, RESTORE_TABLES))

    sequences = sum(member.sequences for member in members)
    if (entry.members, entry.sequences) != (len(members), sequences):
        problem(
            f"shards.arrow says {entry.members} members and {entry.sequences} sequences, the index {len(members)} and "
            f"{sequences}"
        )
    offset, first = 0, expected.first_sequence
    for number, member in enumerate(members, expected.first_member):
        if shard_name(expected.split, member.shard) != expected.name:
            problem(f"the index counts it to shard {member.shard}", number, member.offset)
        if member.first_sequence != first:
            what = f"the index begins it with sequence {member.first_sequence}; the member before it ends at {first}"
            problem(what, number, member.offset)
        if member.offset != offset or member.bytes < TAR_BLOCK or member.bytes % TAR_BLOCK:
            problem(f"the index gives it {member.bytes} bytes; it should begin at {offset}", number, member.offset)
        offset, first = member.offset + member.bytes, member.first_sequence + member.sequences
    if offset > max(size, entry.bytes):
        problem(f"its members end at byte {offset}, the file at {size}")


def _entry(file: BinaryIO, entry: MemberEntry, size: int) -> bytes:
    """The bytes of an entry, as far as the file has them."""
    if not 0 <= entry.offset < size:
        return b""
    file.seek(entry.offset)
    return file.read(max(0, min(entry.bytes, size - entry.offset)))
