"""From Parquet files in an object store to a trained model, by the commands of the README."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from pyarrow import fs
from support import TINY, Finished, corpus, run_command


def test_prepare_lint_and_train_from_a_bucket(s3_port: int, tmp_path: Path) -> None:
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
        # Processes and a cluster of their own: those of the session do not know the bucket.
        "RAY_ADDRESS": "",
    }
    options = {"scheme": "http", "endpoint_override": f"127.0.0.1:{s3_port}", "region": "us-east-1"}
    keys = {"access_key": "testing", "secret_key": "testing"}
    s3 = fs.S3FileSystem(**options, **keys, allow_bucket_creation=True)
    s3.create_dir("bucket")
    texts = corpus() + corpus()[:500]
    for number in range(3):
        table = pa.table({"id": list(range(len(texts[number::3]))), "body": texts[number::3]})
        pyarrow.parquet.write_table(table, f"bucket/corpus/part-{number}.parquet", filesystem=s3, row_group_size=400)

    def vae_dist(*arguments: str) -> Finished:
        done = run_command([sys.executable, "-m", "vae_dist", *arguments], environment)
        assert done.status == 0, done.err
        return done

    flags = ["--text-field", "body", "--deduplicate", "exact", "--max-tokens", "16", "--vocab-size", "300"]
    made = vae_dist("data", "prepare", "s3://bucket/corpus", "s3://bucket/prepared", *flags).json
    assert made["duplicate_texts"] == 500
    assert sum(split["sequences"] for split in made["splits"].values()) == 4500
    names = {info.base_name for info in s3.get_file_info(fs.FileSelector("bucket/prepared", recursive=True))}
    assert {"manifest.json", "index.arrow", "shards.arrow", "tokenizer.json", "train-000000.tar"} <= names
    assert not {name for name in names if "work" in name or name.endswith(".tmp")}, names
    linted = vae_dist("data", "lint", "s3://bucket/prepared").json
    assert linted["problems"] == []
    assert linted["sequences"] == 4500
    cache = tmp_path / "cache"
    settings = [*TINY, "data.dir=s3://bucket/prepared", f"data.cache_dir={cache}", f"run.storage={tmp_path}"]
    trained = vae_dist("train", *settings, "train.steps=20", "run.name=s3").json
    assert trained["steps"] == 20
    assert trained["valid"]["ppl"] > 1
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) > 50_000
    assert "testing" not in (tmp_path / "s3" / "resolved.yaml").read_text()
    assert os.listdir(tmp_path / "s3" / "model")
