"""Byte ranges of files, whole or not at all: cheap on local disks, and through the faults of object stores.

A remote range is asked for in requests of at most `RetryPolicy.read_bytes`. A request that breaks off, stalls or
comes back short is repeated from the first byte that is missing. pyarrow hands over nothing of a request that broke
off, so there the request is the unit of what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyarrow as pa
from pyarrow import fs

from vae_dist.data.store.open_files import OpenFiles
from vae_dist.data.store.range_cache import RangeCache
from vae_dist.data.store.retry import Retries, RetryPolicy, Tries, within
from vae_dist.errors import DataError

_AGAIN = "Restore it from a copy, or delete the data set and prepare it again."


class RangeReader:
    """Byte ranges of files below one root, whole or not at all. Threads may share one.

    Attributes:
        is_remote: whether a read costs a round trip to a store.
    """

    def __init__(
        self,
        filesystem: fs.FileSystem,
        root: str,
        cache: RangeCache | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.root, self.is_remote = root, not isinstance(filesystem, fs.LocalFileSystem)
        self._filesystem, self._cache = filesystem, cache
        self._files = OpenFiles(filesystem, root)
        self._retries = Retries(retry or RetryPolicy(), self.is_remote)

    @property
    def retries(self) -> int:
        """Requests repeated so far."""
        return self._retries.count

    def read(self, name: str, offset: int, size: int, version: str) -> pa.Buffer:
        """The bytes [offset, offset + size) of a file.

        Args:
            version: hash of the whole file, by which a cached range is known.

        Raises:
            DataError: they cannot be had; names the file, the byte and what happened last.
        """
        if self._cache is None or not self.is_remote:
            return pa.py_buffer(self._fetch(name, offset, size))
        data = self._cache.get(version, offset, size)
        if data is None:
            data = self._fetch(name, offset, size)
            self._cache.put(version, offset, data)
        return pa.py_buffer(data)

    def forget(self, name: str, offset: int, size: int, version: str) -> None:
        """The caller found the bytes of a range wrong: the next read asks the store, not the cache."""
        self._files.drop(name)
        if self._cache is not None:
            self._cache.remove(version, offset, size)

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file, piece by piece; never from the cache.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such file.
            DataError: it cannot be read.
        """
        size = self._retries.ask(f"{self.root}/{name}", lambda: self._files.get(name).size())
        for offset in range(0, size, self._retries.policy.read_bytes):
            yield self._fetch(name, offset, min(self._retries.policy.read_bytes, size - offset))

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of all files directly below the root, by name.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such directory.
            DataError: it cannot be listed.
        """
        found = self._retries.ask(self.root, lambda: self._filesystem.get_file_info(fs.FileSelector(self.root)))
        return {info.base_name: info.size for info in found if info.type == fs.FileType.File}

    def _fetch(self, name: str, offset: int, size: int) -> bytes:
        path = f"{self.root}/{name}"
        if not self.is_remote:
            return self._read_local(name, path, offset, size)
        tries, parts, position, end = Tries(self._retries.policy), [], offset, offset + size
        while position < end:
            wanted = min(end - position, self._retries.policy.read_bytes)
            try:
                part = within(tries.seconds, partial(self._request, name, wanted, position))
                if not 0 < len(part) <= wanted:
                    raise OSError(f"{len(part)} bytes came where {wanted} were asked for")
            except FileNotFoundError as error:
                raise DataError(f"{path} is not there: {error}. {_AGAIN}") from None
            except Exception as error:
                # What is known of the file may be what is wrong.
                self._files.drop(name)
                self._retries.failed(tries, f"{path}, from byte {position} on,", error)
                continue
            tries.in_a_row = 0
            parts.append(part)
            position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _request(self, name: str, size: int, offset: int) -> bytes:
        return self._files.get(name).read_at(size, offset)

    def _read_local(self, name: str, path: str, offset: int, size: int) -> bytes:
        try:
            data = self._files.get(name).read_at(size, offset)
        except OSError as error:
            raise DataError(f"{path} cannot be read at byte {offset}: {error}. {_AGAIN}") from None
        if len(data) != size:
            raise DataError(f"{path} ends after byte {offset + len(data)}, but {offset + size} were written. {_AGAIN}")
        return data
