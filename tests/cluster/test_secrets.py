"""A run with secrets in its environment and in the URL of its data leaves none of them anywhere."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs
from support import TINY, Finished, RayCluster


def upload(folder: Path, port: int) -> str:
    options = {"scheme": "http", "endpoint_override": f"127.0.0.1:{port}", "region": "us-east-1"}
    s3 = fs.S3FileSystem(**options, access_key="k", secret_key="s", allow_bucket_creation=True)
    s3.create_dir("secret-test")
    for path in folder.iterdir():
        with s3.open_output_stream(f"secret-test/{path.name}") as out:
            out.write(path.read_bytes())
    return f"secret-test?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"


def holders(folder: Path, needles: list[str]) -> list[str]:
    """Files below a folder that hold one of the needles."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            found += [f"{path}: {needle}" for needle in needles if needle.encode() in data]
    return found


@pytest.mark.long
def test_a_run_leaves_no_secret_anywhere(
    ray_cluster: RayCluster, train: Callable[..., Finished], dataset_dir: Path, s3_port: int, tmp_path: Path
) -> None:
    user, password, environment = (secrets.token_hex(16) for _ in range(3))
    token = Path(ray_cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    needles = [user, password, environment, token]
    place = upload(dataset_dir, s3_port)
    # In a file, as one keeps it; arguments are for everybody to see in any case.
    config = tmp_path / "config.yaml"
    config.write_text(f"data:\n  dir: s3://{user}:{password}@{place}\n")
    storage = tmp_path / "storage"
    settings = [*TINY, f"run.storage={storage}", "run.name=quiet", "train.steps=6", "run.checkpoint_every_steps=3"]
    names = ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "RAY_AUTH_TOKEN_COPY")
    hidden = {"AWS_EC2_METADATA_DISABLED": "true", **dict.fromkeys(names, environment)}
    done = train(str(config), *settings, environment=hidden)
    assert done.status == 0, done.err
    assert len(list((storage / "quiet/checkpoints").iterdir())) == 2 and (storage / "quiet/report.html").exists()
    assert "***@secret-test" in (storage / "quiet/resolved.yaml").read_text()
    assert not [needle for needle in needles if needle in done.out + done.err]
    assert holders(storage, needles) == []
    # The logs of the driver, the workers and the nodes.
    assert holders(ray_cluster.folder, needles) == []
    # Found where it is: the search itself works.
    assert holders(tmp_path, [password]) == [f"{config}: {password}"]
    # The same command resumes (here: says that it is finished), though what it compares with has no credentials.
    again = train(str(config), *settings, environment=hidden, timeout=60)
    assert again.status == 0 and "is finished" in again.err


def test_a_failing_run_tells_no_secret(train: Callable[..., Finished], s3_port: int, tmp_path: Path) -> None:
    password = secrets.token_hex(16)
    url = f"s3://user:{password}@nowhere/x?scheme=http&endpoint_override=127.0.0.1:{s3_port}&region=us-east-1"
    for key in ("data.dir", "data.source"):
        done = train(f"{key}={url}", f"run.storage={tmp_path}", timeout=120)
        assert done.status == 2 and "nowhere" in done.err, done.err
        assert password not in done.out + done.err, done.err
