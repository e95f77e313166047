"""The stream and its batches: one global order whatever the workers, exact resume, little padding, flat memory."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support import wait_for

from vae_dist.config.schema import DataConfig, PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.store.split import Split
from vae_dist.data.stream.batch import Share, collate, micro_batches
from vae_dist.data.stream.order import OrderSpec
from vae_dist.data.stream.pipeline import batch_pipeline
from vae_dist.data.stream.stream import Stream, gather
from vae_dist.data.stream.windows import EpochWindows
from vae_dist.data.text.special_ids import EOS_ID, PAD_ID
from vae_dist.errors import DataError

OPTIONS = PrepareConfig(
    tokenizer="word", vocab_size=4096, valid_fraction=0.0, test_fraction=0.0, member_sequences=64, shard_bytes=16_384
)


def write_corpus(path: Path, count: int, longest: int = 12, seed: int = 0) -> None:
    """One text a line, each different: its number, then random words."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(2.4, 0.6, count).astype(int) + 1, longest)
    lines = [f"n{i} " + " ".join(f"w{w}" for w in rng.integers(0, 50, n)) for i, n in enumerate(lengths)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_dataset(folder: Path, count: int, **kwargs: int) -> Dataset:
    write_corpus(folder / "corpus.txt", count, **kwargs)
    return prepare(str(folder / "corpus.txt"), folder / "data", OPTIONS)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return make_dataset(tmp_path_factory.mktemp("stream"), 1003).split("train")


@pytest.fixture(scope="module")
def spec(split: Split) -> OrderSpec:
    return OrderSpec(
        sequences=split.sequences, manifest_hash="ab" * 32, seed=5, streams=8, batch_sequences=32,
        length_groups=5, block_sequences=20, window_sequences=70,
    )  # fmt: skip


def rows(share: Share) -> list[tuple[int, tuple[int, ...]]]:
    """(sample id, tokens) of a share."""
    return [(int(i), tuple(map(int, tokens))) for i, tokens in zip(share.sample_id, share.sequences, strict=True)]


def global_batch(split: Split, spec: OrderSpec, world: int, step: int) -> list[tuple[int, tuple[int, ...]]]:
    return sorted(
        row for rank in range(world) for row in rows(Stream([split], EpochWindows(spec), rank, world).share(step))
    )


def test_the_union_over_ranks_does_not_depend_on_the_world_size(split: Split, spec: OrderSpec) -> None:
    steps = range(spec.steps_per_epoch + 3)
    streams = {
        world: [Stream([split], EpochWindows(spec), rank, world) for rank in range(world)] for world in (1, 2, 4, 8)
    }
    seen: list[tuple[int, ...]] = []
    for step in steps:
        unions = {w: sorted(row for one in ranks for row in rows(one.share(step))) for w, ranks in streams.items()}
        assert unions[1] == unions[2] == unions[4] == unions[8]
        real = EpochWindows(spec).real_sequences(step)
        assert len(unions[1]) == real
        assert {one.share(step).real_sequences for one in streams[4]} == {real}
        seen += [tokens for _, tokens in unions[1]]
    epoch = seen[: split.sequences]
    assert sorted(epoch) == sorted(tuple(map(int, tokens)) for tokens in split.read(0, split.sequences))


def test_sample_ids_name_the_slot_in_the_global_order(split: Split, spec: OrderSpec) -> None:
    total: list[int] = []
    for step in range(2 * spec.steps_per_epoch):
        ids = [i for i, _ in global_batch(split, spec, 1, step)]
        low = step * spec.batch_sequences
        if len(ids) == spec.batch_sequences:
            assert ids == list(range(low, low + spec.batch_sequences))
        assert all(low <= i < low + spec.batch_sequences for i in ids)
        total += ids
    assert len(set(total)) == len(total) == 2 * split.sequences


def test_a_share_is_the_same_whatever_was_read_before(split: Split, spec: OrderSpec) -> None:
    run = Stream([split], EpochWindows(spec), 1, 4)
    wanted = {step: rows(run.share(step)) for step in range(2 * spec.steps_per_epoch + 1)}
    for step in (0, 7, spec.steps_per_epoch - 1, spec.steps_per_epoch, 2 * spec.steps_per_epoch):
        assert rows(Stream([split], EpochWindows(spec), 1, 4).share(step)) == wanted[step]
    back_and_forth = Stream([split], EpochWindows(spec), 1, 4)
    for step in (40, 3, 39, 4, 0, 33):
        assert rows(back_and_forth.share(step)) == wanted[step]


def test_epochs_have_different_batches(split: Split, spec: OrderSpec) -> None:
    first, second = ({tokens for _, tokens in global_batch(split, spec, 1, step)} for step in (0, spec.steps_per_epoch))
    assert len(first & second) < 10


def test_another_number_of_workers_mid_run_repeats_and_loses_nothing(split: Split, spec: OrderSpec) -> None:
    plan = [(2, 0, 9), (8, 9, 20), (1, 20, 21), (4, 21, spec.steps_per_epoch)]
    seen = []
    for world, first, end in plan:
        for rank in range(world):
            for share in Stream([split], EpochWindows(spec), rank, world).shares(first, end):
                seen += rows(share)
    assert len({i for i, _ in seen}) == len(seen)
    assert sorted(t for _, t in seen) == sorted(tuple(map(int, t)) for t in split.read(0, split.sequences))


def test_a_world_size_that_does_not_divide_the_streams_is_refused(split: Split, spec: OrderSpec) -> None:
    with pytest.raises(ValueError, match="world size 3 does not divide 8 streams"):
        Stream([split], EpochWindows(spec), 0, 3)


def test_a_stream_may_have_no_sequence_in_the_last_batch(tmp_path: Path) -> None:
    split = make_dataset(tmp_path, 65).split("train")
    spec = OrderSpec(65, "00" * 32, 0, 8, 32, 2, 4, 100)
    sizes = [len(Stream([split], EpochWindows(spec), rank, 8).share(2).sequences) for rank in range(8)]
    assert sum(sizes) == 1
    assert EpochWindows(spec).real_sequences(2) == 1
    empty = Stream([split], EpochWindows(spec), sizes.index(0), 8).share(2)
    (batch,) = micro_batches(empty, 16)
    assert batch.weight_B.tolist() == [0.0]


def reading_threads() -> list[threading.Thread]:
    gc.collect()
    return [t for t in threading.enumerate() if t.name.startswith("stream-read-ahead")]


def test_the_next_window_is_read_ahead_and_the_thread_ends_with_the_stream(split: Split, spec: OrderSpec) -> None:
    asked: list[int] = []

    class Watched:
        def read_runs(self, runs: list[tuple[int, int]]) -> Sequences:
            asked.append(sum(count for _, count in runs))
            return split.read_runs(runs)

    spec = dataclasses.replace(spec, window_sequences=20)
    stream = Stream([Watched()], EpochWindows(spec), 0, 2)
    shares = stream.shares(3, 30)
    got = [rows(next(shares)) for _ in range(2)]
    # Rank 0 of 2 owns four streams.
    wait_for(lambda: len(asked) > 4, 5, "the second window")
    assert len(reading_threads()) == 1
    shares.close()
    del stream, shares
    wait_for(lambda: not reading_threads(), 5, "the end of the thread")
    assert got == [rows(Stream([split], EpochWindows(spec), 0, 2).share(step)) for step in (3, 4)]
    assert list(Stream([split], EpochWindows(spec), 0, 2).shares(4, 4)) == []


def test_waiting_for_data_is_measured() -> None:
    class Slow(ArraySplit):
        def read_runs(self, runs: list[tuple[int, int]]) -> Sequences:
            time.sleep(0.2)
            return super().read_runs(runs)

    stream = Stream([Slow(64)], EpochWindows(OrderSpec(64, "00" * 32, 0, 1, 8, 8, 16, 64)), 0, 1)
    assert len(list(stream.shares(0, 8))) == 8
    assert 0.2 <= stream.take_waited_seconds() < 0.4
    assert stream.take_waited_seconds() == 0.0


def test_damage_is_raised_in_the_consumer(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 400)
    (first_shard, *_) = sorted((tmp_path / "data").glob("train-*.tar"))
    damaged = bytearray(first_shard.read_bytes())
    damaged[700] ^= 1
    first_shard.write_bytes(damaged)
    spec = OrderSpec(400, "00" * 32, 0, 1, 40, 4, 16, 400)
    with pytest.raises(DataError, match=f"{first_shard.name}.*damaged"):
        list(Stream([dataset.split("train")], EpochWindows(spec), 0, 1).shares(0, 10))


class ArraySplit:
    """A split in memory, made as it is read; lengths as those of newspaper sentences (mean 21, s.d. 11)."""

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences

    def read_runs(self, runs: list[tuple[int, int]]) -> Sequences:
        return Sequences.concatenate([self.read(first, count) for first, count in runs])

    def read(self, first: int, count: int) -> Sequences:
        rng = np.random.default_rng(first)
        lengths = np.minimum(rng.gamma(4.0, 5.3, count).astype(np.int64) + 1, 128)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Sequences(np.full(int(offsets[-1]), 4, dtype=np.uint16), offsets)


def default_spec(sequences: int, batch: int = 64) -> OrderSpec:
    data = DataConfig()
    return OrderSpec(
        sequences, "cd" * 32, 0, data.streams, batch, 1024, 1024, 50_000,
    )  # fmt: skip


def test_padding_is_below_three_percent_with_the_default_configuration() -> None:
    split = ArraySplit(102_400)
    spec = default_spec(split.sequences)
    stream = Stream([split], EpochWindows(spec), 0, 1)
    real = padded = 0
    for step in range(spec.steps_per_epoch):
        lengths = stream.share(step).sequences.lengths
        real += int(lengths.sum())
        padded += len(lengths) * int(lengths.max())
    assert 1 - real / padded < 0.03


@pytest.mark.parametrize("sequences", [600_000, 6_000_000_000])
def test_memory_does_not_grow_with_the_corpus(sequences: int) -> None:
    tracemalloc.start()
    stream = Stream([ArraySplit(sequences)], EpochWindows(default_spec(sequences)), 0, 4)
    for share in stream.shares(100, 300):
        assert len(share.sequences) == 16
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Two streams of 50,000 sequences of 21 tokens are 4 MB, and reading them holds them a few times.
    assert peak < 40 * 2**20


def test_gather_gives_the_sequences_in_the_order_asked_for(split: Split) -> None:
    numbers = np.random.default_rng(0).permutation(split.sequences)[:300]
    got = gather(split, numbers, 7)
    assert len(got) == 300
    for number, tokens in zip(numbers, got, strict=True):
        assert np.array_equal(tokens, split.read(int(number), 1)[0])


def test_the_stream_is_a_pipeline_of_webdataset(split: Split, spec: OrderSpec) -> None:
    wanted = [share.sample_id.tolist() for share in Stream([split], EpochWindows(spec), 1, 2).shares(3, 9)]
    stream = Stream([split], EpochWindows(spec), 1, 2)
    pipeline = batch_pipeline(stream, 3, 9, webdataset.map(lambda batch: batch.sample_id_B.tolist()))
    assert isinstance(pipeline, webdataset.DataPipeline)
    assert list(pipeline) == list(pipeline) == wanted
    small = batch_pipeline(stream, 3, 9, micro_batch_tokens=20)
    assert sorted(int(i) for batch in small for i in batch.sample_id_B) == sorted(i for ids in wanted for i in ids)


def some_share(lengths: list[int]) -> Share:
    sequences = Sequences.from_list([np.arange(4, 4 + n) for n in lengths])
    return Share(sequences, np.arange(100, 100 + len(lengths)), len(lengths))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 200))
def test_micro_batches_hold_every_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    share = some_share(lengths)
    batches = micro_batches(share, budget)
    ids = [int(i) for batch in batches for i in batch.sample_id_B]
    assert sorted(ids) == share.sample_id.tolist()
    for batch in batches:
        count, longest = batch.tokens_BT.shape
        assert count * longest <= budget or count == 1
        assert batch.lengths_B.max() == longest
        for row, (sample_id, length) in enumerate(zip(batch.sample_id_B, batch.lengths_B, strict=True)):
            tokens = batch.tokens_BT[row].tolist()
            assert tokens[:length] == share.sequences[int(sample_id) - 100].tolist()
            assert set(tokens[length:]) <= {PAD_ID}
        flat = batch.tokens_BT.flatten()[batch.valid_N].tolist()
        cut = [flat[a:b] for a, b in zip(batch.offsets_B1[:-1], batch.offsets_B1[1:], strict=True)]
        assert cut == [share.sequences[int(i) - 100].tolist() for i in batch.sample_id_B]
        assert batch.weight_B.tolist() == [1.0] * count


def test_without_a_budget_the_share_is_one_batch_in_its_own_order() -> None:
    (batch,) = micro_batches(some_share([3, 9, 1]), None)
    assert batch.sample_id_B.tolist() == [100, 101, 102]
    assert batch.tokens_BT.shape == (3, 9)


@pytest.mark.parametrize("budget", [None, 10])
def test_nothing_to_read_gives_one_padding_sequence_of_weight_zero(budget: int | None) -> None:
    (batch,) = micro_batches(some_share([]), budget)
    assert batch.tokens_BT.tolist() == [[EOS_ID]]
    assert batch.weight_B.tolist() == [0.0]
    assert batch.sample_id_B.tolist() == [-1]
    assert batch.lengths_B.tolist() == [1]
    assert batch.valid_N.tolist() == [0]
    assert batch.offsets_B1.tolist() == [0, 1]


def test_collate_keeps_narrow_token_types_apart_from_the_padding() -> None:
    wide = Sequences(np.array([65_535, 2, 7], dtype=np.uint16), np.array([0, 2, 3]))
    assert collate(wide, np.array([2**40, 1])).tokens_BT.tolist() == [[65_535, 2], [7, 0]]
    assert collate(wide, np.array([2**40, 1])).sample_id_B.tolist() == [2**40, 1]
