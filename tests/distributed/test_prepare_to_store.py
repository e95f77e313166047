"""Preparing data into an S3-compatible object store: the bytes of a directory, from several processes, and resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from support import corpus

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.errors import DataError
from vae_dist.launch.prepare import run_in_processes

BUCKET = "written"
OPTIONS = PrepareConfig(deduplicate="exact", max_tokens=16, member_sequences=100, shard_bytes=32_768)
GROUP_BYTES = 80_000


@pytest.fixture(scope="module")
def store(s3_port: int) -> Iterator[fs.S3FileSystem]:
    """An empty bucket."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_CONFIG_FILE", os.devnull),
            ("AWS_SHARED_CREDENTIALS_FILE", os.devnull),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ):
            patch.setenv(name, value)
        address = {"scheme": "http", "endpoint_override": f"127.0.0.1:{s3_port}", "region": "us-east-1"}
        filesystem = fs.S3FileSystem(**address, allow_bucket_creation=True)
        filesystem.create_dir(BUCKET)
        yield filesystem


def url(port: int, folder: str) -> str:
    return f"s3://{BUCKET}/{folder}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"


def in_two_processes(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    return run_in_processes(2, function, items)


def test_an_object_store_holds_the_bytes_of_a_directory(store: fs.S3FileSystem, s3_port: int, tmp_path: Path) -> None:
    """After a first try that broke off in the middle of encoding."""
    source = tmp_path / "corpus.txt"
    lines = corpus()
    source.write_text("\n".join([*lines, *lines[:500]]) + "\n", encoding="utf-8")
    encoded: list[int] = []

    def broken(function: Any, items: Sequence[Any]) -> Iterator[Any]:
        for result in map(function, items):
            if function.stage == "encode":
                encoded.append(1)
                if len(encoded) == 2:
                    raise KeyboardInterrupt
            yield result

    def counted(function: Any, items: Sequence[Any]) -> Iterator[Any]:
        encoded.extend([1] * len(items) if function.stage == "encode" else [])
        return in_two_processes(function, items)

    out = url(s3_port, "prepared")
    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), out, OPTIONS, tmp_path, run=broken, group_bytes=GROUP_BYTES)
    with pytest.raises(DataError, match="is not empty and holds no data set"):
        prepare(str(source), url(s3_port, ""), OPTIONS, tmp_path)
    dataset = prepare(str(source), out, OPTIONS, tmp_path, run=counted, group_bytes=GROUP_BYTES)
    local = prepare(str(source), tmp_path / "local", OPTIONS, group_bytes=GROUP_BYTES)
    groups = -(-source.stat().st_size // GROUP_BYTES)
    # Two were done by the first, none of them twice.
    assert len(encoded) == groups > 3
    assert dataset.manifest_hash == local.manifest_hash
    listed = store.get_file_info(fs.FileSelector(f"{BUCKET}/prepared", recursive=True))
    written = {i.path.removeprefix(f"{BUCKET}/prepared/"): i for i in listed if i.is_file}
    found = {name: store.open_input_stream(info.path).read() for name, info in written.items()}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
