"""The files that were read last, kept open, behind the two calls that reading ranges takes."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any, Protocol

from pyarrow import fs

# Descriptors of a local file system are few; an open remote file is a name and a size.
_LOCAL_FILES = 64
_REMOTE_FILES = 16_384


class File(Protocol):
    """The part of pyarrow's NativeFile that is used here; both methods may be called by several threads."""

    def size(self) -> int:
        """Bytes."""

    def read_at(self, nbytes: int, offset: int) -> bytes:
        """At most so many bytes from there."""


class _LocalFile:
    """A descriptor, closed with the last reference to it: a thread may still read when it leaves the table."""

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read_at(self, nbytes: int, offset: int) -> bytes:
        return os.pread(self._descriptor, nbytes, offset)


class _FsspecFile:
    """Asks for the range itself: fsspec's open files read tens of megabytes ahead, each for itself."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path

    def size(self) -> int:
        return int(self._filesystem.info(self._path)["size"])

    def read_at(self, nbytes: int, offset: int) -> bytes:
        return self._filesystem.cat_file(self._path, start=offset, end=offset + nbytes)


class OpenFiles:
    """The files of one root that were used last. Threads may share it."""

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self._filesystem, self._root = filesystem, root
        self._is_local = isinstance(filesystem, fs.LocalFileSystem)
        self._limit = _LOCAL_FILES if self._is_local else _REMOTE_FILES
        self._files: OrderedDict[str, File] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> File:
        """An open file.

        Raises:
            OSError, or what the client of the store raises: it cannot be opened.
        """
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        # Without the lock: opening a remote file is a round trip.
        file = self._open(name)
        with self._lock:
            self._files[name] = file
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
        return file

    def drop(self, name: str) -> None:
        """Open the file anew next time."""
        with self._lock:
            self._files.pop(name, None)

    def _open(self, name: str) -> File:
        path = f"{self._root}/{name}"
        if self._is_local:
            return _LocalFile(path)
        if isinstance(self._filesystem, fs.PyFileSystem) and isinstance(self._filesystem.handler, fs.FSSpecHandler):
            return _FsspecFile(self._filesystem.handler.fs, path)
        return self._filesystem.open_input_file(path)
