"""Byte ranges of files, whole or not at all: cheap on local disks, and through the faults of object stores.

A remote range is asked for in requests of at most `RetryPolicy.read_bytes`. A request that breaks off, stalls or
comes back short is repeated from the first byte that is missing, after a pause that grows and is drawn at random
("full jitter", Brooker 2015, "Exponential backoff and jitter", AWS Architecture Blog), so that many workers do not
return to an overloaded store at the same moment. pyarrow hands over nothing of a request that broke off, so there
the request is the unit of what is kept.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from vae_dist.data.store.open_files import OpenFiles
from vae_dist.data.store.range_cache import RangeCache
from vae_dist.errors import DataError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_WARNING_SECONDS = 10.0
_AGAIN = "Restore it from a copy, or delete the data set and prepare it again."
# The S3 client raises the same class for all errors.
_DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN|HTTP status 40[13]|\b40[13] Forbidden"
)


@dataclass(frozen=True)
class RetryPolicy:
    """How long a remote read is tried.

    Attributes:
        attempts: requests in a row that bring no byte before the read is given up.
        first_delay_seconds, max_delay_seconds: bounds of the pause, which doubles from the first to the last.
        attempt_seconds: a request that takes longer is abandoned and counts as failed.
        deadline_seconds: of one read, all its requests and pauses.
        read_bytes: largest request.
    """

    attempts: int = 8
    first_delay_seconds: float = 0.1
    max_delay_seconds: float = 10.0
    attempt_seconds: float = 30.0
    deadline_seconds: float = 180.0
    read_bytes: int = 4 * 2**20


class RangeReader:
    """Byte ranges of files below one root, whole or not at all. Threads may share one.

    Attributes:
        is_remote: whether a read costs a round trip to a store.
        retries: requests repeated so far.
    """

    def __init__(
        self,
        filesystem: fs.FileSystem,
        root: str,
        cache: RangeCache | None = None,
        retry: RetryPolicy = RetryPolicy(),
    ) -> None:
        self.root, self.is_remote, self.retries = root, not isinstance(filesystem, fs.LocalFileSystem), 0
        self._filesystem, self._cache, self._retry = filesystem, cache, retry
        self._files = OpenFiles(filesystem, root)
        self._lock = threading.Lock()
        self._quiet_until = 0.0

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
        size = self._ask(f"{self.root}/{name}", lambda: self._files.get(name).size())
        for offset in range(0, size, self._retry.read_bytes):
            yield self._fetch(name, offset, min(self._retry.read_bytes, size - offset))

    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of all files directly below the root, by name.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such directory.
            DataError: it cannot be listed.
        """
        found = self._ask(self.root, lambda: self._filesystem.get_file_info(fs.FileSelector(self.root)))
        return {info.base_name: info.size for info in found if info.type == fs.FileType.File}

    def _ask(self, path: str, operation: Callable[[], _T]) -> _T:
        """An operation that takes one request, repeated while it fails."""
        tries = _Tries(self._retry)
        while True:
            try:
                return _within(tries.seconds, operation) if self.is_remote else operation()
            except (FileNotFoundError, NotADirectoryError):
                raise
            except Exception as error:
                self._failed(tries, path, error)

    def _fetch(self, name: str, offset: int, size: int) -> bytes:
        path = f"{self.root}/{name}"
        if not self.is_remote:
            return self._read_local(name, path, offset, size)
        tries, parts, position, end = _Tries(self._retry), [], offset, offset + size
        while position < end:
            wanted = min(end - position, self._retry.read_bytes)
            try:
                part = _within(tries.seconds, partial(self._request, name, wanted, position))
                if not 0 < len(part) <= wanted:
                    raise OSError(f"{len(part)} bytes came where {wanted} were asked for")
            except FileNotFoundError as error:
                raise DataError(f"{path} is not there: {error}. {_AGAIN}") from None
            except Exception as error:
                # What is known of the file may be what is wrong.
                self._files.drop(name)
                self._failed(tries, f"{path}, from byte {position} on,", error)
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

    def _failed(self, tries: _Tries, where: str, error: Exception) -> None:
        """Wait until it is time for the next attempt, or give up."""
        tries.failures += 1
        tries.in_a_row += 1
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        if not self.is_remote or isinstance(error, PermissionError) or _DENIED.search(reason):
            raise DataError(f"{where} cannot be read: {reason}. Check the permissions and credentials.") from None
        delay = random.uniform(0, tries.longest_delay())
        spent = time.monotonic() - tries.began
        if tries.in_a_row >= self._retry.attempts or spent + delay >= self._retry.deadline_seconds:
            raise DataError(
                f"{where} cannot be read: {tries.failures} requests failed in {spent:.1f} s, the last with: {reason}. "
                "Check the network and the state of the store, then start again."
            ) from None
        with self._lock:
            self.retries += 1
            is_quiet, now = time.monotonic() < self._quiet_until, time.monotonic()
            self._quiet_until = self._quiet_until if is_quiet else now + _WARNING_SECONDS
        level = logging.DEBUG if is_quiet else logging.WARNING
        logger.log(level, "%s asked again in %.2f s (retry %d): %s", where, delay, self.retries, reason)
        time.sleep(delay)


class _Tries:
    """What one read has been through."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy, self.began, self.failures, self.in_a_row = policy, time.monotonic(), 0, 0

    @property
    def seconds(self) -> float:
        """What the next request may take."""
        left = self.began + self._policy.deadline_seconds - time.monotonic()
        return max(0.0, min(self._policy.attempt_seconds, left))

    def longest_delay(self) -> float:
        return min(self._policy.max_delay_seconds, self._policy.first_delay_seconds * 2 ** (self.in_a_row - 1))


def _within(seconds: float, operation: Callable[[], _T]) -> _T:
    """Run a request in a thread of its own and wait for it so long.

    The thread of a request that took longer cannot be stopped; it ends with its connection, unheard.

    Raises:
        TimeoutError: it took longer.
    """
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(operation())
        except BaseException as error:  # handed to the caller, who raises it
            answer.set_exception(error)

    threading.Thread(target=run, name="range-request", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():
            return answer.result()
        raise TimeoutError(f"no answer within {seconds:.1f} s") from None
