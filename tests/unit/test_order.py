"""The canonical order: every sequence once an epoch, in full batches, shuffled, and free to compute."""

from __future__ import annotations

import dataclasses
import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vae_dist.data.stream.order import EpochOrder, OrderSpec, mix, permute
from vae_dist.data.stream.windows import EpochWindows, WindowKey

HASH = hashlib.sha256(b"a manifest").hexdigest()


def spec_of(sequences: int, **changes: int | str) -> OrderSpec:
    values = {
        "manifest_hash": HASH, "seed": 0, "streams": 4, "batch_sequences": 32, "length_groups": 8,
        "block_sequences": 16, "window_sequences": 512,
    }  # fmt: skip
    return OrderSpec(sequences=sequences, **(values | changes))


def some_lengths(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(1, 60, count)


def epoch_batches(spec: OrderSpec, epoch: int, lengths: np.ndarray) -> list[np.ndarray]:
    """All batches of an epoch as sequence numbers, read as a stream would read them."""
    order, windows, batches = EpochOrder(spec, epoch), EpochWindows(spec), []
    for window in range(max(1, round(spec.steps_per_epoch / spec.length_groups))):
        key, steps = WindowKey(epoch, window), []
        for stream in range(spec.streams):
            (piece,) = windows.pieces(key, stream)
            numbers = order.sequence_numbers(stream, piece.first, piece.count)
            groups = windows.groups(key, lengths[numbers])
            steps.append(np.split(numbers[groups.places], np.cumsum(groups.sizes)[:-1]))
        batches += [np.concatenate(parts) for parts in zip(*steps, strict=True)]
    return batches


@st.composite
def specs(draw: st.DrawFn) -> OrderSpec:
    streams = draw(st.integers(1, 6))
    return spec_of(
        draw(st.integers(1, 700)),
        seed=draw(st.integers(0, 2**32 - 1)),
        streams=streams,
        batch_sequences=streams * draw(st.integers(1, 7)),
        length_groups=draw(st.integers(1, 9)),
        block_sequences=draw(st.integers(1, 40)),
        window_sequences=draw(st.integers(1, 150)),
    )


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(0, 5))
def test_every_sequence_comes_exactly_once_in_full_batches(spec: OrderSpec, epoch: int) -> None:
    batches = epoch_batches(spec, epoch, some_lengths(spec.sequences))
    assert sorted(np.concatenate(batches).tolist()) == list(range(spec.sequences))
    assert len(batches) == spec.steps_per_epoch
    sizes = [len(batch) for batch in batches]
    assert all(size == spec.batch_sequences for size in sizes[:-1])
    first_step = epoch * spec.steps_per_epoch
    assert sizes == [EpochWindows(spec).real_sequences(first_step + step) for step in range(len(sizes))]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**80), 2**80))
def test_permute_is_a_permutation_and_inverse_inverts_it(size: int, key: int) -> None:
    index = np.arange(size, dtype=np.int64)
    image = permute(index, size, key)
    assert np.array_equal(np.sort(image), index)
    assert np.array_equal(permute(image, size, key, inverse=True), index)
    assert np.array_equal(permute(index[: size // 2], size, key), image[: size // 2])


@pytest.mark.parametrize("size", [2**40 - 1, 2**40, 2**40 + 1, 2**61 + 3])
def test_permute_covers_domains_of_any_size(size: int) -> None:
    index = np.concatenate([np.arange(500), size - 1 - np.arange(500)]).astype(np.int64)
    image = permute(index, size, 7)
    assert len(np.unique(image)) == len(index)
    assert image.min() >= 0
    assert image.max() < size
    assert np.array_equal(permute(image, size, 7, inverse=True), index)


def test_permutations_of_a_small_domain_are_close_to_uniform() -> None:
    seen = np.zeros((5, 5))
    for key in range(1500):
        image = permute(np.arange(5), 5, mix(key, 1))
        seen[np.arange(5), image] += 1
    # 16 degrees of freedom: a p-value of 1e-6 is at 57.
    assert ((seen - 300) ** 2 / 300).sum() < 57


def test_mix_depends_on_every_part_and_its_place() -> None:
    values = {mix(1, 2), mix(2, 1), mix(1), mix(1, 2, 0), mix(0, 1, 2), mix(1, 3), mix(2**63, 2)}
    assert len(values) == 7
    assert all(0 <= value < 2**64 for value in values)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"manifest_hash": hashlib.sha256(b"another manifest").hexdigest()},
        {"block_sequences": 17},
        {"window_sequences": 300},
        {"streams": 8},
        {"length_groups": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_in_the_spec_changes_the_order(change: dict[str, int | str]) -> None:
    spec, lengths = spec_of(2000), some_lengths(2000)
    here = np.concatenate(epoch_batches(spec, 0, lengths))
    there = np.concatenate(epoch_batches(dataclasses.replace(spec, **change), 0, lengths))
    assert (here == there).mean() < 0.2


def test_epochs_differ_and_repeat_exactly() -> None:
    spec, lengths = spec_of(2000), some_lengths(2000)
    first, second = (np.concatenate(epoch_batches(spec, epoch, lengths)) for epoch in (0, 1))
    assert (first == second).mean() < 0.02
    assert np.array_equal(first, np.concatenate(epoch_batches(spec, 0, lengths)))


def test_the_order_does_not_follow_the_corpus_or_the_epoch_before() -> None:
    count = 8192
    spec, equal = spec_of(count, window_sequences=4096), np.full(count, 7)
    orders = [np.concatenate(epoch_batches(spec, epoch, equal)) for epoch in (0, 1)]
    corpus = np.arange(count)
    # Blocks of 16 move as one through the first level: 512 of them, a standard error of 512 ** -0.5 = 0.044.
    assert abs(stats.spearmanr(orders[0], corpus).statistic) < 0.25
    at = np.empty(count, dtype=np.int64)
    at[orders[0]] = corpus
    assert abs(stats.spearmanr(at[orders[1]], corpus).statistic) < 0.25
    neighbours = (np.abs(np.diff(orders[0])) == 1).mean()
    assert neighbours < 0.01


def test_windows_and_streams_are_shuffled_each_in_its_own_way() -> None:
    # One block: what a stream permutes is the corpus itself.
    spec = spec_of(400, streams=2, batch_sequences=4, length_groups=25, block_sequences=400, window_sequences=50)
    order, shuffles = EpochOrder(spec, 0), []
    for stream in range(2):
        for window in range(4):
            numbers = order.sequence_numbers(stream, 50 * window, 50) - (200 * stream + 50 * window)
            assert sorted(numbers.tolist()) == list(range(50))
            shuffles.append(tuple(numbers))
    assert len(set(shuffles)) == 8


def test_streams_and_windows_are_cut_evenly_whatever_the_lengths() -> None:
    spec = spec_of(1000)
    assert [spec.stream_sequences(stream) for stream in range(spec.streams)] == [250] * 4
    assert sorted(spec_of(1003).stream_sequences(stream) for stream in range(4)) == [250, 251, 251, 251]


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(0, 3))
def test_the_way_back_finds_stream_and_window_of_every_sequence(spec: OrderSpec, epoch: int) -> None:
    order = EpochOrder(spec, epoch)
    for stream in range(spec.streams):
        numbers = order.sequence_numbers(stream, 0, spec.stream_sequences(stream))
        for position, number in enumerate(numbers.tolist()):
            assert order.owner(number) == (stream, position // spec.window_sequences)


def test_a_stripe_gives_each_of_its_streams_one_block_at_the_same_place() -> None:
    spec = spec_of(64 * 40, streams=8, batch_sequences=32, block_sequences=10, window_sequences=80)
    order, taken = EpochOrder(spec, 0), []
    for window in range(4):
        stripes = [sorted(first // 80 for first, _ in order.runs(stream, window)) for stream in range(8)]
        assert all(each == stripes[0] for each in stripes)
        taken.append(stripes[0])
    assert sorted(number for stripes in taken for number in stripes) == list(range(32))
    blocks = {stream: [first // 10 % 8 for first, _ in order.runs(stream, 0)] for stream in range(8)}
    # No stream always gets the same block of a stripe.
    assert len(set(blocks[0])) > 2


def test_batches_are_homogeneous_in_length_and_unbiased() -> None:
    spec = spec_of(64 * 256, batch_sequences=64, length_groups=64, window_sequences=8192)
    lengths = np.random.default_rng(0).lognormal(3.0, 0.6, spec.sequences).astype(np.int64) + 1
    batches = epoch_batches(spec, 0, lengths)
    within = np.mean([lengths[batch].std() for batch in batches])
    assert within < 0.2 * lengths.std()
    # Which length comes when is a permutation: batch means over the epoch carry no trend.
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(stats.spearmanr(means, np.arange(len(means))).statistic) < 5 / len(means) ** 0.5


def test_the_leftover_batch_is_not_chosen_by_length() -> None:
    lengths = some_lengths(1000)
    lefts = []
    for seed in range(60):
        spec = spec_of(1000, seed=seed)
        lefts.append(lengths[epoch_batches(spec, 0, lengths)[-1]])
    left = np.concatenate(lefts)
    assert abs(left.mean() - lengths.mean()) < 5 * lengths.std() / len(left) ** 0.5


def test_thirty_billion_sequences_cost_nothing() -> None:
    started = time.perf_counter()
    spec = spec_of(
        3 * 10**10, streams=64, batch_sequences=4096, length_groups=256, block_sequences=256, window_sequences=65_536
    )
    order = EpochOrder(spec, 3)
    numbers = order.sequence_numbers(63, 4 * 10**8, 1000)
    (piece,) = EpochWindows(spec).pieces(WindowKey(3, 10**4), 7)
    groups = EpochWindows(spec).groups(WindowKey(3, 10**4), np.full(piece.count, 9))
    taken = time.perf_counter() - started
    assert taken < 0.1
    assert len(np.unique(numbers)) == 1000
    assert numbers.min() >= 0
    assert numbers.max() < spec.sequences
    assert sorted(groups.places.tolist()) == list(range(piece.count))
    assert abs(piece.count - 256 * 64) <= 64
    assert EpochWindows(spec).real_sequences(spec.steps_per_epoch - 1) == 3 * 10**10 - (spec.steps_per_epoch - 1) * 4096
