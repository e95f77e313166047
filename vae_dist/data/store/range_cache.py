"""A bounded cache on local disk for ranges of remote files, shared by the processes of a host."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from vae_dist.errors import DataError

logger = logging.getLogger(__name__)

_LEDGER = "ledger"
_TEMPORARY = ".tmp"
# What a file takes on disk is a whole number of these.
_DISK_BLOCK = 4096
# Eviction looks at every file, so it makes room for a while.
_KEPT_FRACTION = 0.9


class RangeCache:
    """Byte ranges as files named by a hash of (version, offset, size), least recently used out first.

    One lock file, the ledger, guards all writing and holds the bytes in use, so the bound holds for all processes
    together. Reading takes no lock: a file comes into being by renaming, and one that is removed while it is read
    stays whole for its reader. Only the size of what is read is checked here; the caller has the checksum.
    """

    def __init__(self, directory: str | Path, max_bytes: int) -> None:
        """Open or make a cache directory, readable by this user alone.

        Args:
            max_bytes: bound on the disk space of all ranges, for all processes that use the directory.

        Raises:
            DataError: the directory cannot be made or written.
        """
        self._directory, self._max_bytes = str(directory), max_bytes
        self._may_write = True
        self._has_complained = threading.Event()
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            with self._ledger():
                pass
        except OSError as error:
            raise DataError(
                f"The cache directory {directory} cannot be used: {error}. Choose one on a local disk that can be "
                "written, or none."
            ) from None

    def get(self, version: str, offset: int, size: int) -> bytes | None:
        """The bytes of a range, or None when they are not here."""
        path = self._path(version, offset, size)
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.read(size + 1)
                # Modification time is the time of last use: access times are often not kept.
                os.utime(file.fileno())
        except FileNotFoundError:
            return None
        except OSError as error:
            self._complain("cannot be read, so ranges are fetched again", error)
            return None
        if len(data) != size:
            logger.warning("%s has %d bytes of %d; the range is fetched again", path, len(data), size)
            self.remove(version, offset, size)
            return None
        return data

    def put(self, version: str, offset: int, data: bytes) -> None:
        """Keep a range. A disk that is full or fails is logged once, and nothing is kept from then on."""
        if not self._may_write or _footprint(len(data)) > self._max_bytes * _KEPT_FRACTION:
            return
        path = self._path(version, offset, len(data))
        try:
            with self._ledger() as ledger:
                if os.path.exists(path):
                    return
                used = self._used(ledger)
                if used + _footprint(len(data)) > self._max_bytes:
                    used = self._evict(int(self._max_bytes * _KEPT_FRACTION) - _footprint(len(data)))
                # Noted first: a writer that dies half way leaves a number that is too large, which eviction mends.
                os.pwrite(ledger, b"%20d" % (used + _footprint(len(data))), 0)
                _write(path, data)
        except OSError as error:
            self._may_write = False
            self._complain("cannot be written, so this process keeps nothing more in it", error)

    def remove(self, version: str, offset: int, size: int) -> None:
        """Drop a range, so that it is fetched again."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(version, offset, size))

    def _path(self, version: str, offset: int, size: int) -> str:
        name = hashlib.blake2b(f"{version}:{offset}:{size}".encode(), digest_size=20).hexdigest()
        # Spread over 256 folders: the cache may hold millions of ranges.
        return f"{self._directory}/{name[:2]}/{name}"

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[int]:
        """The ledger, locked. Opened each time: a lock taken through a shared descriptor keeps no thread out."""
        descriptor = os.open(f"{self._directory}/{_LEDGER}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _used(self, ledger: int) -> int:
        written = os.pread(ledger, 20, 0).strip()
        # A new directory, or a ledger that somebody damaged: count.
        return int(written) if written.isdigit() else self._evict(self._max_bytes)

    def _evict(self, target_bytes: int) -> int:
        """Remove the least recently used files until at most `target_bytes` are left; the bytes left."""
        files: list[tuple[int, int, str]] = []
        for folder in os.scandir(self._directory):
            for entry in os.scandir(folder) if folder.is_dir() else ():
                if entry.name.endswith(_TEMPORARY):
                    # Writers hold the lock, so this one's writer is dead.
                    os.unlink(entry)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    files.append((status.st_mtime_ns, _footprint(status.st_size), entry.path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used <= target_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used

    def _complain(self, what: str, error: OSError) -> None:
        if not self._has_complained.is_set():
            self._has_complained.set()
            logger.warning("the cache %s %s: %s", self._directory, what, error)


def _footprint(size: int) -> int:
    return -(-size // _DISK_BLOCK) * _DISK_BLOCK


def _write(path: str, data: bytes) -> None:
    """Under another name first: a reader sees the whole file or none."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    temporary = f"{path}.{os.getpid()}{_TEMPORARY}"
    try:
        with open(temporary, "wb", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(f"{temporary} could not be written whole")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
