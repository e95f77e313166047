"""The folder in which a prepare keeps what is finished, so that a killed one goes on where it stopped.

    <out>/.work/plan.json             what is being made; another plan means that nothing here can be used
    <out>/.work/<stage>-000012.*      what task 12 of a stage wrote
    <out>/.work/<stage>-000012.json   its record, written last: the task is finished when this is there

A file appears whole or not at all: it is renamed into place on a local file system, and a put is atomic in an object
store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from pyarrow import fs

from vae_dist.data.prepare.tasks import Progress, Run
from vae_dist.errors import DataError, MachineError

PLAN = "plan.json"
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


Record = dict[str, Any]
"""What is known of a finished task; JSON-able. `texts` is how many texts it went through, for the progress."""


@dataclass(frozen=True)
class _Task:
    """One task of a stage, with its record; what executors run."""

    work: Folder
    stage: str
    function: Callable[[int, Any], Record]

    def __call__(self, item: tuple[int, Any]) -> tuple[int, Record]:
        number, content = item
        try:
            if not self.work.has(PLAN):
                raise DataError(
                    f"This process does not see {self.work.path}. On a cluster of several machines prepare into a "
                    "directory that all of them share, or into an object store."
                )
            record = self.function(number, content)
            self.work.write_json(record_name(self.stage, number), record)
        except OSError as error:
            raise cannot_write(self.work.path, error) from None
        return number, record


def record_name(stage: str, number: int) -> str:
    """File name of the record of a task."""
    return f"{stage}-{number:06d}.json"


def cannot_write(path: str, error: OSError) -> MachineError:
    """The error for a folder that cannot be written, or read again."""
    return MachineError(f"{path} cannot be written: {error}. Make room or choose another.")


@dataclass(frozen=True)
class Stages:
    """Runs stages: what is finished is taken from the folder, the rest is given to the executor."""

    work: Folder
    run: Run
    progress: Progress

    def finish(
        self, stage: str, function: Callable[[int, Any], Record], items: Sequence[Any], sizes: Sequence[int]
    ) -> list[Record]:
        """The records of all tasks of a stage, in order.

        Args:
            function: from a task's number and item to its record; what it writes has the number in its name.
            sizes: how much each task goes through, in bytes or sequences, for the progress.

        Raises:
            DataError: of a task, as the task raised it.
            MachineError: the folder cannot be written.
        """
        there = self.work.names()
        found: dict[int, Record] = {}
        for number in range(len(items)):
            if record_name(stage, number) in there:
                found[number] = self.work.read_json(record_name(stage, number))
        pending = [(number, item) for number, item in enumerate(items) if number not in found]
        if not pending:
            return [found[number] for number in range(len(items))]
        self.progress.begin(stage, sum(sizes), sum(sizes[n] for n in found))
        try:
            for number, record in self.run(_Task(self.work, stage, function), pending):
                found[number] = record
                self.progress.advance(sizes[number], record.get("texts", 0))
        finally:
            self.progress.end()
        return [found[number] for number in range(len(items))]
