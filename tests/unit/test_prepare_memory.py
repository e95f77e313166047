"""Preparing a corpus takes memory that does not grow with it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from support import run_command

MIB = 2**20
# Prepares a small corpus, which brings in what is imported late and fills every buffer, then the large one.
SCRIPT = """
import json, resource, sys
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare import deduplicate
from vae_dist.data.prepare.prepare import prepare

# So small that the small corpus fills them.
deduplicate._RUN_KEYS = deduplicate._BUCKET_KEYS = 2**16

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

folder, options = sys.argv[1:]
options = PrepareConfig.model_validate_json(options)
prepare(f"{folder}/small.txt", f"{folder}/small", options, group_bytes=2**20)
before = peak()
dataset = prepare(f"{folder}/large.txt", f"{folder}/large", options, group_bytes=2**20)
facts = dataset.manifest["splits"]["train"]
print(json.dumps({"growth": peak() - before, "texts": facts["texts"], "tokens": facts["tokens"],
                  "duplicates": dataset.manifest["duplicate_texts"]}))
"""


def write_corpus(path: Path, size: int, seed: int) -> int:
    """Lines of eight long words, which are fast to tokenise for their size; returns how many."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=30)) for _ in range(500)]
    (path.parent / "words.txt").write_text("\n".join(words), encoding="utf-8")
    lines = 0
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            file.writelines(f"{' '.join(rng.choices(words, k=8))}\n" for _ in range(1000))
            lines += 1000
    return lines


@pytest.mark.parametrize(
    ("deduplicate", "allowed"),
    [
        ("none", 8 * MIB),
        pytest.param("exact", 8 * MIB, marks=pytest.mark.long),
        pytest.param("near", 16 * MIB, marks=pytest.mark.long),
    ],
)
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, deduplicate: str, allowed: int) -> None:
    """The large corpus is ten or more times what memory may grow by."""
    from vae_dist.config.schema import PrepareConfig
    from vae_dist.data.prepare.prepare import train_tokenizer

    write_corpus(tmp_path / "small.txt", 48 * MIB, seed=1)
    lines = write_corpus(tmp_path / "large.txt", 160 * MIB, seed=1)
    whole = {"valid_fraction": 0.0, "test_fraction": 0.0}
    tokenizer = train_tokenizer(str(tmp_path / "words.txt"), PrepareConfig(tokenizer="word", **whole), tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    options = PrepareConfig(
        tokenizer=str(tmp_path / "tokenizer.json"), deduplicate=deduplicate, shard_bytes=4 * MIB, **whole
    )
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), options.model_dump_json()]
    done = run_command(command, timeout=250)
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["texts"] + found["duplicates"] == lines
    assert found["tokens"] == 9 * found["texts"]
    assert found["growth"] <= allowed, f"{found['growth'] / MIB:.1f} MiB"
