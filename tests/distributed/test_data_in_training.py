"""Data sets under a real training: a shard that disappears, damage that is skipped, a mixture; two workers each."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import TINY, Finished, RayCluster, corpus, records, start_command, wait_for

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.store.dataset import Dataset

# Small members and shards: most of the data set has not been read when the first steps are done.
OPTIONS = PrepareConfig(max_tokens=16, member_sequences=50, shard_bytes=8192, valid_fraction=0.02, test_fraction=0.0)
SHORT = ["train.steps=40", "run.log_every_steps=10", "evaluate.every_steps=1000", "cluster.workers=2"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    lines = [f"{sentence} n{number}" for number, sentence in enumerate(corpus(repeats=12))]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepare(str(folder / "corpus.txt"), folder / "data", OPTIONS)
    return folder / "data"


@pytest.mark.long
def test_a_shard_that_disappears_ends_the_run_on_all_ranks(
    ray_cluster: RayCluster, prepared: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    settings = [*TINY, f"data.dir={data}", f"run.storage={tmp_path}", "run.name=lost", "cluster.workers=2"]
    # Windows of 16 sequences a stream: what is read ahead is soon used up.
    settings += ["data.length_groups=4", "data.shuffle_window_sequences=16", "data.shuffle_block_sequences=50"]
    settings += ["train.epochs=1", "run.log_every_steps=5", "evaluate.every_steps=100000"]
    process = start_command([sys.executable, "-m", "vae_dist.train", *settings], ray_cluster.environment)
    wait_for(lambda: records(tmp_path / "lost", "train"), 120, "the first steps")
    for shard in sorted(data.glob("train-*.tar"))[100:]:
        shard.unlink()
    lost_at = time.monotonic()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "train-0" in err and ".tar, member" in err and "cannot be read" in err, err
    assert "Traceback" not in err and '"finished": true' not in out
    print(f"\nthe run ended {time.monotonic() - lost_at:.1f} s after the shards were gone")


@pytest.mark.long
def test_damage_is_skipped_within_its_budget_and_reported(
    train: Callable[..., Finished], prepared: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    (tmp_path / "corpus.txt").write_text("\n".join(corpus()[:640]) + "\n", encoding="utf-8")
    prepare(str(tmp_path / "corpus.txt"), data, OPTIONS)
    index = Dataset.open(data).index
    shard = data / "train-000000.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[int(index.column("bytes")[0].as_py()) // 2] ^= 1
    shard.write_bytes(damaged)
    settings = [*TINY, *SHORT, f"data.dir={data}", f"run.storage={tmp_path}", "run.name=skip"]
    settings += ["train.steps=null", "train.epochs=2"]
    stopped = train(*settings)
    assert stopped.status == 2 and "train-000000.tar, member" in stopped.err and "is damaged" in stopped.err
    done = train(*settings, "data.damage=skip", "data.damage_budget_fraction=0.2")
    assert done.status == 0, done.err
    # A member of 50 is missing in each of two epochs.
    assert records(tmp_path / "skip", "train")[-1]["skipped_sequences"] == 100


@pytest.mark.long
def test_a_mixture_trains_in_its_proportions(train: Callable[..., Finished], prepared: Path, tmp_path: Path) -> None:
    lines = [f"{sentence} m{number}" for number, sentence in enumerate(corpus())]
    (tmp_path / "other.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = OPTIONS.model_copy(update={"tokenizer": str(prepared / "tokenizer.json")})
    other = tmp_path / "other"
    prepare(str(tmp_path / "other.txt"), other, options)
    mixture = f"data.mixture={{{prepared}: 3, {other}: 1}}"
    done = train(*TINY, *SHORT, mixture, f"run.storage={tmp_path}", "run.name=mixed")
    assert done.status == 0, done.err
    last = records(tmp_path / "mixed", "train")[-1]
    assert last["mixture"] == {str(prepared): pytest.approx(0.75, abs=0.01), str(other): pytest.approx(0.25, abs=0.01)}
    assert 0 <= last["data_wait_fraction"] < 1
    unlike = train(*TINY, *SHORT, f"data.mixture={{{prepared}: 3, {tmp_path / 'nowhere'}: 1}}")
    assert unlike.status == 2 and "no data set directory" in unlike.err
