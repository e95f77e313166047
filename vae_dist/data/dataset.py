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
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pyarrow import fs

from vae_dist.data.filesystem import resolve
from vae_dist.data.sequences import Sequences
from vae_dist.data.shards import FORMAT_VERSION, MemberEntry, decode_member, hash_file, payload_schema
from vae_dist.data.tokenizer import Tokenizer
from vae_dist.errors import DataError

_CACHED_BYTES = 16 * 2**20
_PREPARE_HINT = "Make one with `vae-dist data prepare SOURCE OUT`."
_AGAIN = "Restore it from a copy, or delete the data set and prepare it again."
_MANIFEST_KEYS = ("format_version", "tokenizer_sha256", "vocab_size", "splits", "index_xxh3", "shards_xxh3")
_COLUMNS = tuple(f.name for f in fields(MemberEntry))


@dataclass(frozen=True)
class _Place:
    """Where a data set lies."""

    path: str
    filesystem: fs.FileSystem


class Dataset:
    """An opened data set directory; the manifest decides what it is.

    Attributes:
        manifest_hash: sha256 of manifest.json, which pins every byte of the data set.
    """

    def __init__(self, place: _Place, manifest: dict[str, Any], manifest_hash: str) -> None:
        self._place = place
        self.path, self.manifest, self.manifest_hash = place.path, manifest, manifest_hash
        self.tokenizer = _open_tokenizer(place, manifest)
        self._index = _open_table(place, "index", manifest)
        self.shards = _open_table(place, "shards", manifest)
        _check_shards(place, self.shards)

    @staticmethod
    def open(path: str | Path) -> Dataset:
        """Open a local directory or an object-store URL.

        Raises:
            DataError: missing, without manifest, of another format version, with another tokenizer, or with shards
                missing or of the wrong size.
        """
        filesystem, inner = resolve(path)
        raw = _read_manifest(filesystem, inner, str(path))
        manifest = _parse_manifest(raw, str(path))
        return Dataset(_Place(inner, filesystem), manifest, hashlib.sha256(raw).hexdigest())

    @property
    def splits(self) -> list[str]:
        """Names of the splits that hold sequences."""
        return list(self.manifest["splits"])

    def split(self, name: str) -> Split:
        """One split, ready to read.

        Raises:
            DataError: there is no such split; names those there are.
        """
        if name not in self.manifest["splits"]:
            raise DataError(
                f"{self.path} has no split {name!r}; it has {', '.join(self.splits)}. Choose one of these, or prepare "
                "the data again from a source with that split, or with a larger fraction for it."
            )
        schema = payload_schema(self.manifest["vocab_size"], self.manifest["tokenizer_sha256"])
        mine = self.shards.filter(pa.compute.field("split") == name)
        shards = mine.column("name").to_pylist()
        return Split(self._place, name, self.manifest["splits"][name], shards, self._index, schema)


class Split:
    """A split's sequences, by number. Threads may share one."""

    def __init__(
        self, place: _Place, name: str, facts: dict[str, int], shards: list[str], index: pa.Table, schema: pa.Schema
    ) -> None:
        self.name, self.sequences, self.tokens = name, int(facts["sequences"]), int(facts["tokens"])
        self.max_tokens = int(facts["max_tokens"])
        self._place, self._shards, self._schema = place, shards, schema
        first, count = int(facts["first_member"]), int(facts["members"])
        # Views into the memory map: a column of a billion members costs no memory until it is looked at.
        self._columns = {c: index.column(c).chunk(0).slice(first, count).to_numpy() for c in _COLUMNS}
        self._cache: OrderedDict[int, Sequences] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def read(self, first: int, count: int) -> Sequences:
        """The sequences [first, first + count), across member and shard borders, copied.

        Raises:
            DataError: a member is damaged; names shard, member and offset.
        """
        if first < 0 or count < 0 or first + count > self.sequences:
            raise IndexError(f"sequences [{first}, {first + count}) of a split with {self.sequences}")
        starts = self._columns["first_sequence"]
        member = int(np.searchsorted(starts, first, side="right")) - 1
        parts, end = [], first + count
        while first < end:
            whole, base = self._member(member), int(starts[member])
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
        path = f"{self._place.path}/{self._shards[entry.shard]}"

        def where() -> str:
            return f"{path}, member {number} of split {self.name} at byte {entry.offset},"

        try:
            with self._place.filesystem.open_input_file(path) as file:
                file.seek(entry.offset)
                payload = file.read_buffer(entry.bytes)
        except OSError as error:
            raise DataError(f"{where()} cannot be read: {error}. {_AGAIN}") from None
        return decode_member(payload, entry, self._schema, where)


def _read_manifest(filesystem: fs.FileSystem, inner: str, path: str) -> bytes:
    try:
        if filesystem.get_file_info(inner).type == fs.FileType.NotFound:
            raise DataError(f"There is no data set directory {path}. {_PREPARE_HINT}")
        with filesystem.open_input_stream(f"{inner}/manifest.json") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path} has no manifest.json, so it is no finished data set: a prepare that was interrupted leaves "
            f"none. {_PREPARE_HINT}"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Check the address and its permissions.") from None


def _parse_manifest(raw: bytes, path: str) -> dict[str, Any]:
    try:
        manifest = json.loads(raw)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}/manifest.json is not readable. {_AGAIN}") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}; this vae_dist reads version {FORMAT_VERSION}. Prepare the data "
            "again, or use the vae_dist that wrote it."
        )
    missing = [key for key in _MANIFEST_KEYS if key not in manifest]
    if missing:
        raise DataError(f"{path}/manifest.json lacks {', '.join(missing)}. {_AGAIN}")
    return manifest


def _check_shards(place: _Place, shards: pa.Table) -> None:
    """Every shard is there with the size it had when it was written."""
    names = shards.column("name").to_pylist()
    infos = place.filesystem.get_file_info([f"{place.path}/{name}" for name in names])
    for name, size, info in zip(names, shards.column("bytes").to_pylist(), infos, strict=True):
        if info.type == fs.FileType.NotFound:
            raise DataError(f"{place.path} lacks the shard {name}. {_AGAIN}")
        if info.size != size:
            raise DataError(f"{place.path}/{name} has {info.size} bytes, but {size} were written. {_AGAIN}")


def _open_tokenizer(place: _Place, manifest: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.load(_local_copy(place, "tokenizer.json", manifest["tokenizer_sha256"]))
    if tokenizer.sha256 != manifest["tokenizer_sha256"]:
        raise DataError(
            f"{place.path} was prepared with another tokenizer than its tokenizer.json: the file's hash is "
            f"{tokenizer.sha256[:12]}, the manifest says {manifest['tokenizer_sha256'][:12]}. {_AGAIN}"
        )
    return tokenizer


def _open_table(place: _Place, name: str, manifest: dict[str, Any]) -> pa.Table:
    expected = manifest[f"{name}_xxh3"]
    local = _local_copy(place, f"{name}.arrow", expected)
    if not local.is_file() or hash_file(local) != expected:
        raise DataError(f"{place.path}/{name}.arrow is not the one that the manifest names. {_AGAIN}")
    return pa.ipc.open_file(pa.memory_map(str(local))).read_all()


def _local_copy(place: _Place, name: str, expected_hash: str) -> Path:
    """The file itself when it is local, else a copy in the temporary directory, named by what it should hold."""
    if isinstance(place.filesystem, fs.LocalFileSystem):
        return Path(place.path) / name
    folder = Path(tempfile.gettempdir()) / f"vae_dist-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    local = folder / f"{expected_hash}-{name}"
    # Other workers of this machine may do the same at the same time.
    temporary = folder / f"{local.name}.{os.getpid()}.tmp"
    try:
        with place.filesystem.open_input_stream(f"{place.path}/{name}") as source:
            temporary.write_bytes(source.read())
    except FileNotFoundError:
        return Path(f"{place.path}/{name}")
    os.replace(temporary, local)
    return local
