"""The data set directory: a small manifest, a memory-mapped index, a tokenizer, and shards read by range.

    manifest.json    format version, tokenizer hash, dtype, totals per split, hashes of the tables; written last
    index.arrow      a row per tar member: split, shard, offset, bytes, first_sequence, sequences, tokens, crc32
    shards.arrow     a row per tar: split, name, bytes, xxh3, members, sequences
    tokenizer.json

Reading sequence i looks it up in the index (binary search over a memory map) and reads one member: memory does
not grow with the corpus and nothing is scanned.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pyarrow import fs

from vae_dist.data.sequences import Sequences
from vae_dist.data.shards import FORMAT_VERSION, MemberEntry, ShardEntry, hash_file, payload_schema, read_member
from vae_dist.data.tokenizer import Tokenizer
from vae_dist.errors import DataError

_CACHED_BYTES = 16 * 2**20
_PREPARE_HINT = "Make one with `vae-dist data prepare SOURCE OUT`."
_COLUMNS = tuple(f.name for f in fields(MemberEntry))


class Dataset:
    """An opened data set directory; the manifest decides what it is."""

    def __init__(self, path: str, filesystem: fs.FileSystem, manifest: dict[str, Any], manifest_hash: str) -> None:
        self.path, self.manifest, self.manifest_hash = path, manifest, manifest_hash
        self._filesystem = filesystem
        self.tokenizer = _open_tokenizer(filesystem, path, manifest)
        self._index = _open_table(filesystem, path, "index.arrow", manifest)
        self._shards = _open_table(filesystem, path, "shards.arrow", manifest)
        self._check_shards()

    @staticmethod
    def open(path: str | Path) -> Dataset:
        """Open a local directory or an object-store URL.

        Raises:
            DataError: missing, without manifest, of another format version, with another tokenizer, or with shards
                missing or of the wrong size.
        """
        filesystem, inner = _filesystem(str(path))
        if filesystem.get_file_info(inner).type == fs.FileType.NotFound:
            raise DataError(f"There is no data set directory {path}. {_PREPARE_HINT}")
        try:
            with filesystem.open_input_stream(f"{inner}/manifest.json") as stream:
                raw = stream.read()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{path} has no manifest.json, so it is no finished data set: a prepare that was interrupted leaves "
                f"none. {_PREPARE_HINT}"
            ) from None
        try:
            manifest = json.loads(raw)
            version = manifest["format_version"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}/manifest.json is not readable. Prepare the data set again.") from None
        if version != FORMAT_VERSION:
            raise DataError(f"{path} has format version {version}; this vae_dist reads {FORMAT_VERSION}.")
        return Dataset(inner, filesystem, manifest, hashlib.sha256(raw).hexdigest())

    @property
    def splits(self) -> list[str]:
        """Names of the splits that hold sequences."""
        return list(self.manifest["splits"])

    def split(self, name: str) -> Split:
        """One split, ready to read."""
        if name not in self.manifest["splits"]:
            raise DataError(f"{self.path} has no split {name!r}; it has {', '.join(self.splits)}.")
        schema = payload_schema(self.manifest["vocab_size"], self.manifest["tokenizer_sha256"])
        rows = self._shards.filter(pa.compute.field("split") == name)
        names = rows.column("name").to_pylist()
        return Split(self, name, names, self._index, self._filesystem, schema)

    def _check_shards(self) -> None:
        """Every shard is there with the size it had when it was written."""
        names = self._shards.column("name").to_pylist()
        infos = self._filesystem.get_file_info([f"{self.path}/{name}" for name in names])
        for name, size, info in zip(names, self._shards.column("bytes").to_pylist(), infos, strict=True):
            if info.type == fs.FileType.NotFound:
                raise DataError(f"{self.path} lacks the shard {name}. Restore it or prepare the data set again.")
            if info.size != size:
                raise DataError(
                    f"{self.path}/{name} has {info.size} bytes and not {size}, as when it was written. Restore it or "
                    "prepare the data set again."
                )


class Split:
    """A split's sequences, by number."""

    def __init__(
        self, dataset: Dataset, name: str, shards: list[str], index: pa.Table, filesystem: fs.FileSystem, schema: pa.Schema
    ) -> None:
        facts = dataset.manifest["splits"][name]
        self.name, self.sequences, self.tokens = name, int(facts["sequences"]), int(facts["tokens"])
        self.max_tokens = int(facts["max_tokens"])
        self._path, self._shards, self._filesystem, self._schema = dataset.path, shards, filesystem, schema
        first, count = int(facts["first_member"]), int(facts["members"])
        # Views into the memory map: a column of a billion members costs no memory until it is looked at.
        self._columns = {c: index.column(c).chunk(0).slice(first, count).to_numpy() for c in _COLUMNS}
        self._cache: OrderedDict[int, Sequences] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def read(self, first: int, count: int) -> Sequences:
        """The sequences [first, first + count), across member and shard borders.

        Raises:
            DataError: a member is damaged; names shard, member and offset.
        """
        if first < 0 or count < 0 or first + count > self.sequences:
            raise IndexError(f"sequences [{first}, {first + count}) of a split with {self.sequences}")
        starts = self._columns["first_sequence"]
        member = int(np.searchsorted(starts, first, side="right")) - 1
        parts, end = [], first + count
        while first < end:
            whole = self._member(member)
            base = int(starts[member])
            stop = min(end - base, len(whole))
            parts.append(whole.take(np.arange(first - base, stop)))
            first, member = base + stop, member + 1
        return Sequences.concatenate(parts)

    def _member(self, number: int) -> Sequences:
        """A decoded member, from a small cache of the last ones."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
            decoded = self._read_member(number)
            self._cache[number] = decoded
            self._cached_bytes += decoded.tokens.nbytes + decoded.offsets.nbytes
            while self._cached_bytes > _CACHED_BYTES and len(self._cache) > 1:
                _, old = self._cache.popitem(last=False)
                self._cached_bytes -= old.tokens.nbytes + old.offsets.nbytes
            return decoded

    def _read_member(self, number: int) -> Sequences:
        entry = MemberEntry(*(int(self._columns[c][number]) for c in _COLUMNS))
        name = self._shards[entry.shard]
        where = f"{self._path}/{name}, member {number} at byte {entry.offset},"
        try:
            with self._filesystem.open_input_file(f"{self._path}/{name}") as file:
                buffer = file.read_buffer(entry.bytes) if file.seek(entry.offset) is not None else None
        except OSError as error:
            raise DataError(f"{where} cannot be read: {error}. Restore the shard.") from None
        return read_member(buffer, entry, where, self._schema)


def write_tables(directory: Path, members: dict[str, list[MemberEntry]], shards: dict[str, list[ShardEntry]]) -> None:
    """Write index.arrow and shards.arrow, splits one after another in the given order."""
    index = [{"split": split, **asdict(entry)} for split, entries in members.items() for entry in entries]
    table = [{"split": split, **asdict(entry)} for split, entries in shards.items() for entry in entries]
    integers = [(name, pa.uint32() if name == "crc32" else pa.int64()) for name in _COLUMNS]
    _write_table(directory / "index.arrow", index, pa.schema([("split", pa.string()), *integers]))
    kinds = {"name": pa.string(), "xxh3": pa.string()}
    columns = [(f.name, kinds.get(f.name, pa.int64())) for f in fields(ShardEntry)]
    _write_table(directory / "shards.arrow", table, pa.schema([("split", pa.string()), *columns]))


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """The commit point of a data set: until it is there, there is no data set."""
    hashes = {f"{name}_xxh3": hash_file(directory / f"{name}.arrow") for name in ("index", "shards")}
    temporary = directory / "manifest.json.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"format_version": FORMAT_VERSION, **manifest, **hashes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / "manifest.json")


def split_facts(members: list[MemberEntry], first_member: int, max_tokens: int, counts: dict[str, int]) -> dict[str, int]:
    """A split's entry in the manifest."""
    return {
        "sequences": sum(m.sequences for m in members),
        "tokens": sum(m.tokens for m in members),
        "max_tokens": max_tokens,
        "first_member": first_member,
        "members": len(members),
        **counts,
    }


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    table = pa.Table.from_pylist(rows, schema=schema).combine_chunks()
    with pa.ipc.new_file(str(path), schema) as writer:
        # One batch, so that a column is one contiguous piece of the memory map.
        writer.write_table(table, max_chunksize=max(1, len(rows)))


def _filesystem(path: str) -> tuple[fs.FileSystem, str]:
    if "://" in path:
        filesystem, inner = fs.FileSystem.from_uri(path)
        return filesystem, inner.rstrip("/")
    return fs.LocalFileSystem(), str(Path(path).resolve())


def _open_tokenizer(filesystem: fs.FileSystem, path: str, manifest: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.load(_local_copy(filesystem, path, "tokenizer.json"))
    if tokenizer.sha256 != manifest["tokenizer_sha256"]:
        raise DataError(
            f"{path} was prepared with another tokenizer than its tokenizer.json: the hash is {tokenizer.sha256[:12]}, "
            f"the manifest says {manifest['tokenizer_sha256'][:12]}. Restore the file or prepare the data set again."
        )
    return tokenizer


def _open_table(filesystem: fs.FileSystem, path: str, name: str, manifest: dict[str, Any]) -> pa.Table:
    local = _local_copy(filesystem, path, name)
    if not local.is_file() or hash_file(local) != manifest[f"{local.stem}_xxh3"]:
        raise DataError(f"{path}/{name} does not match the manifest. Restore it or prepare the data set again.")
    return pa.ipc.open_file(pa.memory_map(str(local))).read_all()


def _local_copy(filesystem: fs.FileSystem, path: str, name: str) -> Path:
    """The file itself when it is local, else a copy in the temporary directory, named by its address."""
    if isinstance(filesystem, fs.LocalFileSystem):
        return Path(path) / name
    import tempfile

    key = hashlib.sha256(f"{path}/{name}".encode()).hexdigest()[:24]
    local = Path(tempfile.gettempdir()) / f"vae_dist-{os.getuid()}" / key / name
    local.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fs.copy_files(f"{path}/{name}", str(local), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
    return local


