"""A folder on any file system. A file in it appears whole or not at all: it is renamed into place on a local file
system, and a put is atomic in an object store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from pyarrow import fs

from vae_dist.errors import DataError

# Object stores have no directories to make.
_OBJECT_STORES = ("s3", "gcs", "abfs")


@dataclass(frozen=True)
class Folder:
    """A folder on any file system; travels to other processes and machines."""

    filesystem: fs.FileSystem
    path: str

    @property
    def is_local(self) -> bool:
        """Whether it is a directory of this machine."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def inner(self, name: str) -> Folder:
        """The folder `name` in this one; made by `make`."""
        return Folder(self.filesystem, f"{self.path}/{name}")

    def make(self) -> None:
        """Create it where folders have to be created."""
        if self.filesystem.type_name not in _OBJECT_STORES:
            self.filesystem.create_dir(self.path, recursive=True)

    def names(self) -> dict[str, int]:
        """Names and bytes of the files directly in it; none when it does not exist."""
        listed = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return {info.base_name: info.size for info in listed if info.is_file}

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self.filesystem.get_file_info(f"{self.path}/{name}").is_file

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A stream into a file that is there, whole, when the block ends without an error."""
        target = f"{self.path}/{name}"
        if not self.is_local:
            with self.filesystem.open_output_stream(target) as stream:
                yield cast(BinaryIO, stream)
            return
        temporary = f"{target}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    def write(self, name: str, data: Any) -> None:
        """A whole file from bytes or a buffer."""
        with self.writing(name) as stream:
            stream.write(data)

    def write_json(self, name: str, value: Any, indent: int | None = None) -> None:
        """A whole JSON file."""
        self.write(name, json.dumps(value, indent=indent, ensure_ascii=False).encode())

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            return stream.read()

    def read_json(self, name: str) -> Any:
        """The value of a JSON file."""
        return json.loads(self.read(name))

    @contextmanager
    def opened(self, name: str) -> Iterator[Callable[[int, int], bytes]]:
        """A function that reads `size` bytes of a file from `offset` on."""
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:

            def read(offset: int, size: int) -> bytes:
                file.seek(offset)
                data: bytes = file.read(size)
                if len(data) != size:
                    raise DataError(
                        f"{self.path}/{name} ends at byte {offset + len(data)}, {size - len(data)} too early. Delete "
                        f"{self.path} and prepare again."
                    )
                return data

            yield read

    def delete(self, names: Iterable[str]) -> None:
        """Delete files."""
        for name in names:
            self.filesystem.delete_file(f"{self.path}/{name}")

    def remove(self) -> None:
        """Delete it with all that is in it; it need not exist."""
        if self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound:
            self.filesystem.delete_dir(self.path)
