"""The data set directory: a small manifest, a memory-mapped index, a tokenizer, and shards read by range.

    manifest.json    format version, tokenizer hash, dtype, totals per split, hashes of the tables; written last
    index.arrow      a row per tar member: split, shard, offset, bytes, first_sequence, sequences, tokens, crc32
    shards.arrow     a row per tar: split, name, bytes, xxh3, members, sequences
    tokenizer.json

Reading sequence i looks it up in the index (binary search over a memory map) and reads one member: memory does
not grow with the corpus and nothing is scanned. See `split.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from vae_dist.data.store.agreement import disagreements, manifest_faults, table_faults
from vae_dist.data.store.filesystem import resolve
from vae_dist.data.store.range_cache import RangeCache
from vae_dist.data.store.ranges import RangeReader
from vae_dist.data.store.retry import RetryPolicy
from vae_dist.data.store.shards import FORMAT_VERSION, Decoder, hash_file, payload_schema
from vae_dist.data.store.split import Damage, Split
from vae_dist.data.text.tokenizer import Tokenizer
from vae_dist.errors import DataError

# Where a store does not answer when it is opened its address is often wrong; later it is likely to come back.
_OPENING, _READING = RetryPolicy(attempts=8), RetryPolicy()
# What arrives with another hash than it should have is fetched once more.
_TRANSFERS = 2
_PREPARE_HINT = "Make one with `vae-dist data prepare SOURCE OUT`."
RESTORE = "Restore it from a copy, or delete the data set and prepare it again."
_MANIFEST_KEYS = ("format_version", "tokenizer_sha256", "vocab_size", "splits", "index_xxh3", "shards_xxh3")


class Dataset:
    """An opened data set directory; the manifest decides what it is.

    Attributes:
        path: where it lies, without the scheme of a URL.
        manifest_hash: sha256 of manifest.json, which pins every byte of the data set.
        index, shards: the two tables, memory-mapped.
    """

    def __init__(self, filesystem: fs.FileSystem, path: str, manifest: dict[str, Any], manifest_hash: str) -> None:
        """See `open`."""
        self.filesystem, self.path = filesystem, path
        self.manifest, self.manifest_hash = manifest, manifest_hash
        reader = RangeReader(filesystem, path, retry=_OPENING)
        self.tokenizer = open_tokenizer(reader, manifest)
        self.index = open_table(reader, "index", manifest)
        self.shards = open_table(reader, "shards", manifest)
        if found := disagreements(manifest, self.index, self.shards, self.tokenizer.vocab_size):
            raise DataError(f"{path}/manifest.json does not fit the rest of the data set: {found[0]}. {RESTORE}")

    @staticmethod
    def open(path: str | Path, *, check_shards: bool = True) -> Dataset:
        """Open a local directory or an object-store URL.

        Args:
            check_shards: list the directory and compare names and sizes; a worker of a run whose driver has done it
                leaves it out.

        Raises:
            DataError: missing, without manifest, of another format version, with another tokenizer, or with shards
                missing or of the wrong size.
        """
        filesystem, inner = resolve(path, store_attempts=1)
        raw = read_manifest(filesystem, inner, str(path))
        manifest = parse_manifest(raw, str(path))
        dataset = Dataset(filesystem, inner, manifest, hashlib.sha256(raw).hexdigest())
        if check_shards:
            _check_shards(dataset)
        return dataset

    @property
    def splits(self) -> list[str]:
        """Names of the splits that hold sequences."""
        return list(self.manifest["splits"])

    def split(self, name: str, *, damage: Damage | None = None, cache: RangeCache | None = None) -> Split:
        """One split, ready to read.

        Args:
            damage: what to do about members that cannot be used; default: raise.
            cache: keeps what is read from an object store on this host.

        Raises:
            DataError: there is no such split; names those there are.
        """
        if name not in self.manifest["splits"]:
            raise DataError(
                f"{self.path} has no split {name!r}; it has {', '.join(self.splits)}. Choose one of these, or prepare "
                "the data again from a source with that split, or with a larger fraction for it."
            )
        facts, vocab_size = self.manifest["splits"], self.manifest["vocab_size"]
        # The shard table has the splits in the manifest's order; a slice of it is a view of the memory map.
        first_shard = sum(facts[before]["shards"] for before in self.splits[: self.splits.index(name)])
        return Split(
            name,
            facts[name],
            self.shards.slice(first_shard, facts[name]["shards"]),
            self.index,
            Decoder(payload_schema(vocab_size, self.manifest["tokenizer_sha256"]), vocab_size),
            RangeReader(self.filesystem, self.path, cache, _READING),
            damage or Damage(),
        )


def read_manifest(filesystem: fs.FileSystem, inner: str, path: str) -> bytes:
    """The bytes of manifest.json.

    Raises:
        DataError: there is no such directory, or no manifest in it; what to do about it.
    """
    try:
        return b"".join(RangeReader(filesystem, inner, retry=_OPENING).chunks("manifest.json"))
    except (FileNotFoundError, NotADirectoryError):
        if not _is_there(RangeReader(filesystem, inner, retry=_OPENING)):
            raise DataError(f"There is no data set directory {path}. {_PREPARE_HINT}") from None
        raise DataError(
            f"{path} has no manifest.json, so it is no finished data set: a prepare that was interrupted leaves "
            f"none. {_PREPARE_HINT}"
        ) from None


def _is_there(reader: RangeReader) -> bool:
    """Whether a directory, or a file in its place, is there; in object stores only what holds something is."""
    try:
        return bool(reader.sizes()) or not reader.is_remote
    except NotADirectoryError:
        return True
    except FileNotFoundError:
        return False


def parse_manifest(raw: bytes, path: str) -> dict[str, Any]:
    """The facts of a manifest of our format version.

    Raises:
        DataError: it is not one.
    """
    try:
        manifest = json.loads(raw)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}/manifest.json is not readable. {RESTORE}") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}; this vae_dist reads version {FORMAT_VERSION}. Prepare the data "
            "again, or use the vae_dist that wrote it."
        )
    missing = [key for key in _MANIFEST_KEYS if key not in manifest]
    if missing:
        raise DataError(f"{path}/manifest.json lacks {', '.join(missing)}. {RESTORE}")
    if found := manifest_faults(manifest):
        raise DataError(f"{path}/manifest.json is damaged: {found[0]}. {RESTORE}")
    return manifest


def _check_shards(dataset: Dataset) -> None:
    """Every shard is there with the size it had when it was written."""
    found = RangeReader(dataset.filesystem, dataset.path, retry=_OPENING).sizes()
    names, sizes = (dataset.shards.column(c).to_pylist() for c in ("name", "bytes"))
    for name, size in zip(names, sizes, strict=True):
        if name not in found:
            raise DataError(f"{dataset.path} lacks the shard {name}. {RESTORE}")
        if found[name] != size:
            raise DataError(f"{dataset.path}/{name} has {found[name]} bytes, but {size} were written. {RESTORE}")


def open_tokenizer(reader: RangeReader, manifest: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the manifest names.

    Raises:
        DataError: it is missing or another one.
    """
    expected = manifest["tokenizer_sha256"]
    path = _local(reader, "tokenizer.json", expected, _sha256)
    # The parser of tokenizers is not made for damaged files: it sees this one only when it is whole.
    if path.is_file() and _sha256(path) != expected:
        raise DataError(
            f"{reader.root} was prepared with another tokenizer than its tokenizer.json: the file's hash is "
            f"{_sha256(path)[:12]}, the manifest says {expected[:12]}. {RESTORE}"
        )
    return Tokenizer.load(path)


def open_table(reader: RangeReader, name: str, manifest: dict[str, Any]) -> pa.Table:
    """The table `index` or `shards`, memory-mapped.

    Raises:
        DataError: it is not the one that the manifest names.
    """
    expected = manifest[f"{name}_xxh3"]
    local = _local(reader, f"{name}.arrow", expected, hash_file)
    if not local.is_file() or hash_file(local) != expected:
        raise DataError(f"{reader.root}/{name}.arrow is not the one that the manifest names. {RESTORE}")
    try:
        table = pa.ipc.open_file(pa.memory_map(str(local))).read_all()
    except pa.ArrowException as error:
        raise DataError(f"{reader.root}/{name}.arrow is no Arrow file: {error}. {RESTORE}") from None
    if found := table_faults(name, table):
        raise DataError(f"{reader.root}/{found[0]}. {RESTORE}")
    return table


def _local(reader: RangeReader, name: str, expected: str, hashed: Callable[[Path], str]) -> Path:
    """The file itself when it is local, else a copy in the temporary directory, made once and named by its hash."""
    if not reader.is_remote:
        return Path(reader.root) / name
    folder = Path(tempfile.gettempdir()) / f"vae_dist-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    copy = folder / f"{expected}-{name}"
    # Other workers of this machine may do the same at the same time.
    temporary = folder / f"{copy.name}.{os.getpid()}.tmp"
    for _ in range(_TRANSFERS):
        if copy.is_file() and hashed(copy) == expected:
            break
        try:
            with open(temporary, "wb") as file:
                file.writelines(reader.chunks(name))
        except FileNotFoundError:
            return Path(reader.root) / name
        os.replace(temporary, copy)
    return copy


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
