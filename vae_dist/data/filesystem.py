"""Local paths and object-store URLs behind one interface, `pyarrow.fs`."""

from __future__ import annotations

from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
from pyarrow import fs

from vae_dist.errors import DataError


def resolve(address: str | Path) -> tuple[fs.FileSystem, str]:
    """The file system and the path inside it of a local path or URL.

    s3, gs, abfs, hdfs, hf and file are pyarrow's own; any other scheme is asked of fsspec.

    Raises:
        DataError: nobody knows the scheme, or its package is not installed.
    """
    text = str(address)
    if "://" not in text:
        return fs.LocalFileSystem(), str(Path(text).absolute())
    try:
        filesystem, inner = fs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        filesystem, inner = _from_fsspec(text)
    except OSError as error:
        raise DataError(f"{text} cannot be reached: {error}. Check the URL, the network and the credentials.") from None
    return filesystem, inner.rstrip("/")


def _from_fsspec(url: str) -> tuple[fs.FileSystem, str]:
    try:
        filesystem, inner = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise DataError(
            f"{url} cannot be opened: {error}. Check the scheme of the URL, or install the package that provides it."
        ) from None
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), str(inner)
