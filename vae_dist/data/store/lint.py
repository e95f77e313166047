"""Reads a data set directory in full and says everything that is wrong with it.

Opening a data set checks what is cheap, reading it checks what is read. This checks all the rest as well: hashes of
whole shards, what other tar readers see, special tokens, document numbers, every total, sequences that stand in two
splits. It goes on after a problem; only a directory that holds no data set at all is an error.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from vae_dist.data.prepare.lengths import length_facts
from vae_dist.data.store.agreement import description_faults, disagreements
from vae_dist.data.store.dataset import RESTORE, open_table, open_tokenizer, parse_manifest, read_manifest
from vae_dist.data.store.filesystem import resolve
from vae_dist.data.store.lint_member import PREPARE_AGAIN, RESTORE_SHARD
from vae_dist.data.store.lint_shard import Content, Expected, Problem, Tell, check_shard
from vae_dist.data.store.overlap import Overlaps
from vae_dist.data.store.ranges import RangeReader
from vae_dist.data.store.shards import MemberEntry, ShardEntry, payload_schema
from vae_dist.data.text.special_ids import UNK_ID
from vae_dist.errors import DataError

_SHARD = re.compile(r"(.+)-\d{6}\.tar")
_KNOWN_FILES = {"manifest.json", "index.arrow", "shards.arrow", "tokenizer.json", "origin.json"}
_SHOWN_NAMES = 10
_COLUMNS = tuple(f.name for f in fields(MemberEntry))
# Of a sequence in a shard that no table names: a guess from below.
_SEQUENCE_BYTES = 32


@dataclass
class _SplitTotals:
    """What the readable members of a split add up to."""

    members: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    unknown_tokens: int = 0
    last_doc: int = 0

    def add(self, content: Content, shard: str, tell: Tell) -> None:
        lengths, counts = np.unique(content.sequences.lengths, return_counts=True)
        self.lengths.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        self.unknown_tokens += int(np.count_nonzero(content.sequences.tokens == UNK_ID))
        self.members += 1
        if len(content.docs):
            if content.docs[0] < self.last_doc:
                what = f"its first doc number is {content.docs[0]}, but the member before it ended with {self.last_doc}"
                tell(Problem(shard, content.number, None, what, PREPARE_AGAIN))
            self.last_doc = int(content.docs[-1])


def lint(address: str | Path, tell: Tell = lambda problem: None) -> dict[str, Any]:
    """Check a data set directory, local or the URL of one in an object store; every shard is read once.

    Memory: about one tar member and 16 bytes for each sequence of the smaller splits, up to half a gigabyte. A shard
    in an object store is copied to a temporary file first.

    Args:
        tell: is told every problem when it is found.

    Returns:
        path; shards, members, sequences, tokens and bytes that were read; problems and notes; seconds and
        bytes_per_second. JSON-able.

    Raises:
        DataError: there is no such directory, or no manifest.json in it, or the store cannot be reached.
    """
    began, problems = time.monotonic(), list[Problem]()

    def found(problem: Problem) -> None:
        problems.append(problem)
        tell(problem)

    examined = _Lint(str(address), found)
    examined.run()
    seconds = time.monotonic() - began
    speed = {"seconds": round(seconds, 3), "bytes_per_second": round(examined.counts["bytes"] / max(seconds, 1e-9))}
    return {
        "path": str(address),
        **{key: examined.counts[key] for key in ("shards", "members", "sequences", "tokens", "bytes")},
        "problems": [asdict(problem) for problem in problems],
        "notes": examined.notes,
        **speed,
    }


class _Lint:
    def __init__(self, address: str, tell: Tell) -> None:
        filesystem, inner = resolve(address, store_attempts=1)
        self._address, self._tell, self._reader = address, tell, RangeReader(filesystem, inner)
        self.counts: Counter[str] = Counter()
        self.notes: list[dict[str, Any]] = []
        self._manifest: dict[str, Any] | None = None
        self._tables: dict[str, pa.Table | None] = {"index": None, "shards": None}
        self._schema: pa.Schema | None = None
        self._vocab_size: int | None = None
        self._raw = read_manifest(filesystem, inner, address)

    def run(self) -> None:
        self._open()
        present = self._reader.sizes()
        expected: dict[str, list[Expected]] = {}
        for shard in self._expected(present):
            expected.setdefault(shard.split, []).append(shard)
        self._note_strangers(set(present) - _KNOWN_FILES - {shard.name for one in expected.values() for shard in one})
        sizes = {split: sum(_sequences(shard, present) for shard in shards) for split, shards in expected.items()}
        overlaps = Overlaps(sizes)
        for split in overlaps.order:
            totals = _SplitTotals()
            for shard in expected[split]:
                if shard.name in present:
                    self._read(shard, totals, overlaps)
                else:
                    self._problem("it is not there", RESTORE_SHARD, shard.name)
            overlaps.close(split)
            self._check_totals(split, totals)
        self.notes += overlaps.notes()

    def _open(self) -> None:
        """Manifest, tokenizer and tables, as far as they are whole."""
        tokenizer = None
        with self._telling():
            self._manifest = parse_manifest(self._raw, self._address)
        if self._manifest is None:
            return
        manifest = self._manifest
        with self._telling():
            tokenizer = open_tokenizer(self._reader, manifest)
        for name in self._tables:
            with self._telling():
                self._tables[name] = open_table(self._reader, name, manifest)
        self._vocab_size = tokenizer.vocab_size if tokenizer else manifest["vocab_size"]
        self._schema = payload_schema(self._vocab_size, manifest["tokenizer_sha256"])
        dtype = str(self._schema.field("tokens").type.value_type)
        if manifest.get("dtype") != dtype:
            self._problem(f"dtype is {manifest.get('dtype')!r} in the manifest, but tokens are {dtype}")
        for what in description_faults(manifest):
            self._problem(f"in the manifest, {what}")
        index, shards = self._tables["index"], self._tables["shards"]
        if index is not None and shards is not None:
            for what in disagreements(manifest, index, shards, self._vocab_size):
                self._problem(what)

    def _expected(self, present: dict[str, int]) -> Iterator[Expected]:
        """The shards by the tables; without these, by their names."""
        shards = self._tables["shards"]
        if shards is None:
            for name in sorted(present):
                if match := _SHARD.fullmatch(name):
                    yield Expected(name, match[1])
            return
        row, members, sequences = 0, Counter[str](), Counter[str]()
        for shard in _rows(shards):
            split = shard.pop("split")
            entry = ShardEntry(**shard)
            yield Expected(entry.name, split, members[split], sequences[split], entry, row)
            row += entry.members
            members[split] += entry.members
            sequences[split] += entry.sequences

    def _members(self, shard: Expected) -> list[MemberEntry] | None:
        """A shard's rows of the index."""
        index = self._tables["index"]
        if index is None or shard.entry is None:
            return None
        rows = index.slice(shard.first_row, shard.entry.members)
        splits = set(rows.column("split").to_pylist())
        if splits - {shard.split}:
            self._problem(f"the index counts its members to {', '.join(map(repr, splits))}", shard=shard.name)
        return [MemberEntry(*values) for values in zip(*(rows.column(c).to_pylist() for c in _COLUMNS), strict=True)]

    def _read(self, shard: Expected, totals: _SplitTotals, overlaps: Overlaps) -> None:
        members = self._members(shard)
        with self._telling(shard.name), self._opened(shard.name) as file:
            for content in check_shard(file, shard, members, self._schema, self._vocab_size, self._tell):
                totals.add(content, shard.name, self._tell)
                overlaps.add(shard.split, content.first_sequence, content.sequences)
                self.counts["members"] += 1
                self.counts["sequences"] += len(content.sequences)
                self.counts["tokens"] += len(content.sequences.tokens)
            self.counts["shards"] += 1
            self.counts["bytes"] += file.seek(0, 2)

    def _check_totals(self, split: str, totals: _SplitTotals) -> None:
        """The manifest's facts of a split, from its tokens; where members are missing, they are problems enough."""
        facts = (self._manifest or {"splits": {}})["splits"].get(split)
        if facts is None or totals.members != facts["members"] or totals.lengths[0]:
            return
        counted = {**length_facts(totals.lengths), "unknown_tokens": totals.unknown_tokens}
        for key, value in counted.items():
            if facts.get(key) != value:
                self._problem(f"{key} of split {split!r} is {facts.get(key)} in the manifest and {value} in the shards")
        texts = facts.get("texts")
        if not isinstance(texts, int) or texts <= totals.last_doc:
            self._problem(
                f"texts of split {split!r} is {texts} in the manifest, but a text has number {totals.last_doc}"
            )

    def _note_strangers(self, names: set[str]) -> None:
        if names:
            shown = ", ".join(sorted(names)[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
            belong = "file belongs" if len(names) == 1 else "files belong"
            self.notes.append({"what": f"{len(names)} {belong} to no table: {shown}", "files": sorted(names)})

    def _problem(self, what: str, fix: str = RESTORE, shard: str | None = None) -> None:
        self._tell(Problem(shard, None, None, what, fix))

    @contextmanager
    def _telling(self, shard: str | None = None) -> Iterator[None]:
        """An error about the data becomes a problem."""
        try:
            yield
        except DataError as error:
            self._problem(error.message.removesuffix(RESTORE).rstrip(" ."), shard=shard)

    @contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        """A shard as a file of this machine."""
        path = f"{self._reader.root}/{name}"
        try:
            if not self._reader.is_remote:
                with open(path, "rb") as file:
                    yield file
                return
            with tempfile.TemporaryFile() as copy:
                copy.writelines(self._reader.chunks(name))
                yield copy
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}. {RESTORE}") from None


def _sequences(shard: Expected, present: dict[str, int]) -> int:
    return shard.entry.sequences if shard.entry else present[shard.name] // _SEQUENCE_BYTES


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()
