"""The order and the index at the size of the largest clusters, on manifests alone: no shard is there to be read."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from vae_dist.config.load import load_config
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.shards import hash_file
from vae_dist.data.stream.order import EpochOrder, OrderSpec
from vae_dist.data.stream.training_data import order_spec
from vae_dist.data.stream.windows import EpochWindows, WindowKey

RANKS = 16_384
SHARDS, MEMBERS_PER_SHARD = 1_000_000, 2
MEMBER_SEQUENCES, MEMBER_TOKENS = 20_000, 500_000
SEQUENCES = SHARDS * MEMBERS_PER_SHARD * MEMBER_SEQUENCES
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set directory of 10^12 tokens in a million shards, without the shards."""
    folder = tmp_path_factory.mktemp("huge")
    (folder / "corpus.txt").write_text("one small text\n", encoding="utf-8")
    options = PrepareConfig(tokenizer="word", valid_fraction=0.0, test_fraction=0.0)
    prepare(str(folder / "corpus.txt"), folder / "data", options)
    small = Dataset.open(folder / "data")
    members = np.arange(SHARDS * MEMBERS_PER_SHARD)
    columns = {
        "shard": members // MEMBERS_PER_SHARD, "offset": members % MEMBERS_PER_SHARD * 1_050_000,
        "bytes": np.full(len(members), 1_050_000), "first_sequence": members * MEMBER_SEQUENCES,
        "sequences": np.full(len(members), MEMBER_SEQUENCES), "tokens": np.full(len(members), MEMBER_TOKENS),
        "crc32": members,
    }  # fmt: skip
    _write(folder / "data" / "index.arrow", small.index.schema, columns)
    shards = np.arange(SHARDS)
    columns = {
        "name": np.char.add(np.char.add("train-", shards.astype(str)), ".tar"), "bytes": np.full(SHARDS, 2_110_464),
        "xxh3": np.full(SHARDS, "0" * 32), "members": np.full(SHARDS, MEMBERS_PER_SHARD),
        "sequences": np.full(SHARDS, MEMBERS_PER_SHARD * MEMBER_SEQUENCES),
    }  # fmt: skip
    _write(folder / "data" / "shards.arrow", small.shards.schema, columns)
    manifest = json.loads((folder / "data" / "manifest.json").read_text(encoding="utf-8"))
    totals = {"sequences": SEQUENCES, "tokens": len(members) * MEMBER_TOKENS, "members": len(members)}
    manifest["splits"]["train"] |= totals | {"shards": SHARDS, "max_tokens": 128}
    for name in ("index", "shards"):
        manifest[f"{name}_xxh3"] = hash_file(folder / "data" / f"{name}.arrow")
    (folder / "data" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder / "data"


def _write(path: Path, schema: pa.Schema, columns: dict[str, np.ndarray]) -> None:
    rows = len(next(iter(columns.values())))
    arrays = [pa.array(columns.get(f.name, np.full(rows, "train"))).cast(f.type) for f in schema]
    with pa.ipc.new_file(str(path), schema) as writer:
        writer.write_table(pa.table(arrays, schema=schema).combine_chunks(), max_chunksize=rows)


def test_sixteen_thousand_ranks_on_a_trillion_tokens(huge: Path) -> None:
    config = load_config(None, [f"data.streams={RANKS}", f"train.batch_sequences={4 * RANKS}"])
    tracemalloc.start()
    started = time.perf_counter()
    dataset = Dataset.open(huge, check_shards=False)
    split = dataset.split("train")
    opened = time.perf_counter() - started
    assert (split.sequences, split.tokens) == (SEQUENCES, 10**12)
    spec = order_spec(config, split, dataset.manifest_hash)
    windows = EpochWindows(spec)
    step = min(1_000_000, 2 * windows.steps_per_epoch - 1)
    started = time.perf_counter()
    key, _ = windows.locate(step)
    rank = 12_345
    (piece,) = windows.pieces(key, rank)
    order = EpochOrder(spec, piece.epoch)
    shuffle_window = piece.first // spec.window_sequences
    runs = order.runs(rank, shuffle_window)
    groups = windows.groups(key, np.full(piece.count, 25))
    permutation = order.permutation(rank, shuffle_window)
    planned = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(
        f"\n{RANKS:,} ranks, {SHARDS:,} shards, 10^12 tokens: open {opened:.2f} s, plan at step {step:,} "
        f"{1000 * planned:.1f} ms, {peak / MEBIBYTE:.1f} MiB a rank, {len(runs)} reads a shuffle window"
    )
    assert sum(count for _, count in runs) == len(permutation)
    assert len(groups.places) == piece.count
    assert opened < 10
    assert planned < 0.5
    assert peak < 64 * MEBIBYTE
    assert len(runs) < 100


@pytest.mark.long
def test_a_sample_of_the_ranks_holds_every_sequence_once(huge: Path) -> None:
    config = load_config(None, [f"data.streams={RANKS}", f"train.batch_sequences={4 * RANKS}"])
    dataset = Dataset.open(huge, check_shards=False)
    spec = order_spec(config, dataset.split("train"), dataset.manifest_hash)
    assert sum(spec.stream_sequences(stream) for stream in range(RANKS)) == SEQUENCES
    draw = np.random.default_rng(0)
    order = EpochOrder(spec, 3)
    last_window = -(-spec.stream_sequences(0) // spec.window_sequences)
    seen = []
    for rank in draw.choice(RANKS, 12, replace=False).tolist():
        for window in {0, last_window - 1, int(draw.integers(last_window))}:
            begin, count = window * spec.window_sequences, order.window_size(rank, window)
            numbers = order.sequence_numbers(rank, begin, count)
            assert all(order.owner(int(n)) == (rank, window) for n in draw.choice(numbers, 20))
            seen.append(numbers)
    joined = np.concatenate(seen)
    assert joined.min() >= 0
    assert joined.max() < SEQUENCES
    assert len(np.unique(joined)) == len(joined)
    for number in draw.integers(0, SEQUENCES, 10).tolist():
        stream, window = order.owner(number)
        held = order.sequence_numbers(stream, window * spec.window_sequences, order.window_size(stream, window))
        assert (held == number).sum() == 1


def _epoch(spec: OrderSpec) -> np.ndarray:
    """Sequence numbers in the order of the batches, all lengths alike."""
    order, windows, batches = EpochOrder(spec, 0), EpochWindows(spec), []
    step = 0
    while step < spec.steps_per_epoch:
        key, _ = windows.locate(step)
        assert isinstance(key, WindowKey)
        parts = []
        for stream in range(spec.streams):
            (piece,) = windows.pieces(key, stream)
            groups = windows.groups(key, np.full(piece.count, 9))
            numbers = order.sequence_numbers(stream, piece.first, piece.count)[groups.places]
            parts.append(np.split(numbers, np.cumsum(groups.sizes)[:-1]))
        batches += [np.concatenate(turn) for turn in zip(*parts, strict=True)]
        step += len(groups.sizes)
    return np.concatenate(batches)


def test_the_quality_of_the_shuffle_beside_a_true_permutation() -> None:
    """A corpus of 1.6 million sequences of 20 tokens, 8 streams, batches of 256, open sizes as the defaults choose."""
    count, batch = 1_600_000, 256
    spec = OrderSpec(count, "5a" * 32, 0, 8, batch, 1024, 1024, 2**22 // 20)
    true = np.random.default_rng(0).permutation(count)
    found = {}
    for name, order in (("stream", _epoch(spec)), ("permutation", true)):
        rank = stats.spearmanr(order, np.arange(count)).statistic
        jumps = np.abs(np.diff(order)).mean() / count
        whole = order[: count // batch * batch].reshape(-1, batch)
        near = (np.diff(np.sort(whole // 1024, axis=1), axis=1) == 0).mean()
        found[name] = (rank, jumps, near)
        print(
            f"\n{name:12} rank correlation with the corpus {rank:+.4f}, mean jump {jumps:.4f} of the corpus, "
            f"neighbours in a batch from the same 1,024 sequences {100 * near:.1f} %"
        )
    rank, jumps, near = found["stream"]
    # 195 stripes move as one through the first level: a standard error of at most 195 ** -0.5 = 0.07.
    assert abs(rank) < 0.25
    assert jumps == pytest.approx(1 / 3, abs=0.02)
    assert found["permutation"][1] == pytest.approx(1 / 3, abs=0.001)
    assert near < found["permutation"][2] + 0.05
