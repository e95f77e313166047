"""Local paths and object-store URLs behind one interface, `pyarrow.fs`."""

from __future__ import annotations

from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
from pyarrow import fs

from vae_dist.errors import DataError

# On Linux the second is the time without a byte (libcurl's low-speed limit). A process that ends waits for it.
_CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 10.0


def resolve(address: str | Path, *, store_attempts: int = 3) -> tuple[fs.FileSystem, str]:
    """The file system and the path inside it of a local path or URL.

    s3, gs, abfs, hdfs, hf and file are pyarrow's own; any other scheme is asked of fsspec.

    Args:
        store_attempts: how often an S3 client asks before it raises; 1 for a caller who repeats requests itself.

    Raises:
        DataError: nobody knows the scheme, or its package is not installed.
    """
    text = str(address)
    if not text or text.endswith("://"):
        raise DataError(f"{text!r} names no file or directory. Give a path or a whole URL.")
    if "://" not in text:
        return fs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    try:
        filesystem, inner = fs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        filesystem, inner = _from_fsspec(text)
    except OSError as error:
        raise DataError(f"{text} cannot be reached: {error}. Check the URL, the network and the credentials.") from None
    if isinstance(filesystem, fs.S3FileSystem):
        filesystem = _impatient(filesystem, store_attempts)
    return filesystem, inner.rstrip("/")


def _impatient(filesystem: fs.S3FileSystem, attempts: int) -> fs.S3FileSystem:
    """The same file system with timeouts and retries, which a URL cannot say."""
    # What pickling gives are the arguments of the constructor, as the URL and the environment set them.
    _, (options,) = filesystem.__reduce__()
    timeouts = {"connect_timeout": _CONNECT_SECONDS, "request_timeout": _SILENCE_SECONDS}
    return fs.S3FileSystem(**options | timeouts, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts))


def _from_fsspec(url: str) -> tuple[fs.FileSystem, str]:
    try:
        filesystem, inner = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise DataError(
            f"{url} cannot be opened: {error}. Check the scheme of the URL, or install the package that provides it."
        ) from None
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), str(inner)
