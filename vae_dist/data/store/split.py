"""A split's sequences by number: index lookup, one read a run of neighbouring members, every byte checked."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pyarrow as pa

from vae_dist.data.store.ranges import RangeReader
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.store.shards import Decoder, MemberEntry, member_docs
from vae_dist.errors import DataError

logger = logging.getLogger(__name__)

_CACHED_BYTES = 16 * 2**20
# Requests under way at once where each costs a round trip.
_REMOTE_READS = 16
_COLUMNS = tuple(f.name for f in fields(MemberEntry))


class Damage:
    """What becomes of sequences that cannot be read: an error, or they are left out, within a budget."""

    def __init__(self, budget_sequences: int | None = None) -> None:
        """Without a budget the first damage is the error that it is."""
        self._budget = budget_sequences
        self._members: dict[int, DataError] = {}
        self._left_out: set[int] = set()
        self._lock = threading.Lock()

    def accept(self, member: int, error: DataError) -> None:
        """Note what is wrong with a member.

        Raises:
            DataError: it is `error`, when there is no budget.
        """
        if self._budget is None:
            raise error
        with self._lock:
            is_news = member not in self._members
            self._members[member] = error
        if is_news:
            logger.warning("left out: %s", error.message)

    def leave_out(self, numbers: np.ndarray) -> None:
        """Count the sequences that were asked for and are left out.

        Raises:
            DataError: the budget is used up; the damage that was found last.
        """
        with self._lock:
            self._left_out.update(numbers.tolist())
            if self._budget is not None and len(self._left_out) > self._budget:
                *_, last = self._members.values()
                raise DataError(
                    f"{last.message} With this, {len(self._left_out)} sequences would be skipped, more than the "
                    f"{self._budget} that data.damage_budget_fraction allows this worker."
                )


class Split:
    """One split of a data set. Threads may share it.

    Attributes:
        sequences, tokens: totals.
        max_tokens: of the longest sequence.
        member_sequences: sequences in the first member, the unit in which reading is cheapest.
    """

    def __init__(
        self,
        name: str,
        facts: dict[str, int],
        shards: pa.Table,
        index: pa.Table,
        decoder: Decoder,
        reader: RangeReader,
        damage: Damage,
    ) -> None:
        self.name, self.sequences, self.tokens = name, int(facts["sequences"]), int(facts["tokens"])
        self.max_tokens = int(facts["max_tokens"])
        self.damage = damage
        self._shards, self._decoder, self._reader = shards, decoder, reader
        first, count = int(facts["first_member"]), int(facts["members"])
        # Views into the memory map: a column of a billion members costs no memory until it is looked at.
        self._columns = {c: index.column(c).chunk(0).slice(first, count).to_numpy() for c in _COLUMNS}
        self.member_sequences = int(self._columns["sequences"][0])
        self._cache: OrderedDict[int, Sequences] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def read(self, first: int, count: int) -> Sequences:
        """The sequences [first, first + count), across member and shard borders.

        A sequence that is left out because of damage has length 0.

        Raises:
            DataError: a member cannot be read or is damaged; names shard, member and offset.
        """
        if first < 0 or count < 0 or first + count > self.sequences:
            raise IndexError(f"sequences [{first}, {first + count}) of a split with {self.sequences}")
        if count == 0:
            return Sequences.concatenate([])
        starts = self._columns["first_sequence"]
        begin = int(np.searchsorted(starts, first, side="right")) - 1
        end = int(np.searchsorted(starts, first + count, side="left"))
        whole = Sequences.concatenate(self._members(begin, end))
        base = int(starts[begin])
        asked = whole.slice(first - base, first - base + count)
        if not asked.lengths.all():
            self.damage.leave_out(first + np.flatnonzero(asked.lengths == 0))
        return asked

    def read_runs(self, runs: Iterable[tuple[int, int]]) -> Sequences:
        """The sequences of several (first, count) runs, one after another; remote stores are asked in parallel."""
        if not self._reader.is_remote:
            return Sequences.concatenate([self.read(first, count) for first, count in runs])
        with ThreadPoolExecutor(_REMOTE_READS, thread_name_prefix="range-reads") as pool:
            return Sequences.concatenate(list(pool.map(lambda run: self.read(*run), runs)))

    def members(self) -> Iterator[tuple[Sequences, np.ndarray]]:
        """The sequences and int64 doc numbers of every member in order, one member in memory at a time.

        Raises:
            DataError: as `read`, whatever is done about damage there.
        """
        for number in range(len(self._columns["shard"])):
            entry = self._entry(number)
            name, version = self._shard(entry.shard)
            data = self._read(number, entry, name, version)
            yield self._decode(number, entry, name, data, entry.offset), member_docs(data)

    def _entry(self, number: int) -> MemberEntry:
        return MemberEntry(*(int(self._columns[c][number]) for c in _COLUMNS))

    def _shard(self, number: int) -> tuple[str, str]:
        """Name and hash of a shard."""
        return self._shards.column("name")[number].as_py(), self._shards.column("xxh3")[number].as_py()

    def _members(self, begin: int, end: int) -> list[Sequences]:
        """Decoded members [begin, end): from a small cache of the last ones, else in as few reads as possible."""
        with self._lock:
            found = {n: self._cache[n] for n in range(begin, end) if n in self._cache}
            for number in found:
                self._cache.move_to_end(number)
        missing = [number for number in range(begin, end) if number not in found]
        for run in self._adjacent(missing):
            found.update(zip(run, self._load(run), strict=True))
        with self._lock:
            for number in missing:
                self._keep(number, found[number])
        return [found[number] for number in range(begin, end)]

    def _keep(self, number: int, member: Sequences) -> None:
        if number in self._cache:
            return
        self._cache[number] = member
        self._cached_bytes += member.nbytes
        while self._cached_bytes > _CACHED_BYTES and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._cached_bytes -= old.nbytes

    def _adjacent(self, numbers: list[int]) -> list[list[int]]:
        """Cut where a member does not begin where the one before it ended."""
        runs: list[list[int]] = []
        shard, offset, size = (self._columns[c] for c in ("shard", "offset", "bytes"))
        for number in numbers:
            before = runs[-1][-1] if runs else -1
            is_next = before == number - 1 >= 0 and shard[before] == shard[number]
            if is_next and offset[before] + size[before] == offset[number]:
                runs[-1].append(number)
            else:
                runs.append([number])
        return runs

    def _load(self, numbers: list[int]) -> list[Sequences]:
        """Decode neighbouring members of one shard from one read."""
        entries = [self._entry(number) for number in numbers]
        name, version = self._shard(entries[0].shard)
        offset, end = entries[0].offset, entries[-1].offset + entries[-1].bytes
        data = None
        try:
            data = self._reader.read(name, offset, end - offset, version)
            return [self._decode(n, e, name, data, offset) for n, e in zip(numbers, entries, strict=True)]
        except DataError as error:
            # The reader has tried for long already.
            if data is None and len(numbers) == 1:
                return [self._left_out(numbers[0], entries[0], self._out_of_reach(numbers[0], entries[0], name, error))]
            # The store may be whole where the transfer or the copy on this host was not: asked once more, and each
            # member alone, so that one that is damaged or cut off does not take its neighbours with it.
            self._reader.forget(name, offset, end - offset, version)
        return [self._load_again(n, e, name, version) for n, e in zip(numbers, entries, strict=True)]

    def _load_again(self, number: int, entry: MemberEntry, name: str, version: str) -> Sequences:
        try:
            data = self._read(number, entry, name, version)
            return self._decode(number, entry, name, data, entry.offset)
        except DataError as error:
            self._reader.forget(name, entry.offset, entry.bytes, version)
            return self._left_out(number, entry, error)

    def _read(self, number: int, entry: MemberEntry, name: str, version: str) -> pa.Buffer:
        try:
            return self._reader.read(name, entry.offset, entry.bytes, version)
        except DataError as error:
            raise self._out_of_reach(number, entry, name, error) from None

    def _out_of_reach(self, number: int, entry: MemberEntry, name: str, error: DataError) -> DataError:
        return DataError(f"{self._where(number, entry, name)} is out of reach: {error.message}")

    def _decode(self, number: int, entry: MemberEntry, name: str, data: pa.Buffer, offset: int) -> Sequences:
        piece = data.slice(entry.offset - offset, entry.bytes)
        member = self._decoder(piece, entry, lambda: self._where(number, entry, name))
        # Models and batches are laid out for the longest sequence that the manifest names.
        if len(member) and (longest := int(member.lengths.max())) > self.max_tokens:
            raise DataError(
                f"{self._where(number, entry, name)} holds a sequence of {longest} tokens, but max_tokens of split "
                f"{self.name} is {self.max_tokens} in the manifest. Restore manifest.json from a copy."
            )
        return member

    def _where(self, number: int, entry: MemberEntry, name: str) -> str:
        return f"{self._reader.root}/{name}, member {number} of split {self.name} at byte {entry.offset},"

    def _left_out(self, number: int, entry: MemberEntry, error: DataError) -> Sequences:
        self.damage.accept(number, error)
        return Sequences(np.empty(0, dtype=np.int64), np.zeros(entry.sequences + 1, dtype=np.int64))


def read_all(split: Split, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A split's tokens, flat, and offsets; its first part when it has more than `max_tokens`."""
    parts = []
    count = split.sequences if split.tokens <= max_tokens else split.sequences * max_tokens // split.tokens
    for first in range(0, count, 65_536):
        parts.append(split.read(first, min(65_536, count - first)))
    joined = Sequences.concatenate(parts)
    # A sequence that damage left out has length 0.
    whole = joined.take(np.flatnonzero(joined.lengths))
    return whole.tokens, whole.offsets
