"""What the stream promises, over all shapes: once an epoch, the same for every world size, resumable at any step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import Share
from vae_dist.data.stream.order import OrderSpec
from vae_dist.data.stream.stream import Stream
from vae_dist.data.stream.windows import EpochWindows, MixtureWindows, Windows

BASE = 10**6


class NumberedSplit:
    """Sequence i holds its own number (plus that of its data set), once or several times."""

    def __init__(self, sequences: int, component: int = 0) -> None:
        self.sequences, self.component = sequences, component

    def read_runs(self, runs: list[tuple[int, int]]) -> Sequences:
        numbers = np.concatenate([np.arange(first, first + count) for first, count in runs] or [np.arange(0)])
        assert len(numbers) == 0 or (numbers.min() >= 0 and numbers.max() < self.sequences)
        lengths = 1 + numbers * 7919 % 13
        tokens = np.repeat(numbers + self.component * BASE, lengths)
        return Sequences(tokens, np.concatenate([[0], np.cumsum(lengths)]))


@st.composite
def specs(draw: st.DrawFn, smallest: int = 1) -> OrderSpec:
    streams = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    return OrderSpec(
        sequences=draw(st.integers(max(smallest, streams if smallest > 1 else 1), 600)),
        manifest_hash=f"{draw(st.integers(0, 2**60)):032x}",
        seed=draw(st.integers(0, 2**32 - 1)),
        streams=streams,
        batch_sequences=streams * draw(st.integers(1, 6)),
        length_groups=draw(st.integers(1, 9)),
        block_sequences=draw(st.integers(1, 50)),
        window_sequences=draw(st.integers(1, 120)),
    )


def world_sizes(spec: OrderSpec) -> list[int]:
    return [w for w in range(1, spec.streams + 1) if spec.streams % w == 0]


def rows(share: Share) -> list[tuple[int, int]]:
    """(sample id, sequence number), each row checked to be whole."""
    assert all(len(set(row.tolist())) == 1 for row in share.sequences)
    assert [len(row) for row in share.sequences] == [1 + row[0] % BASE * 7919 % 13 for row in share.sequences]
    return [(int(i), int(row[0])) for i, row in zip(share.sample_id, share.sequences, strict=True)]


def read(
    splits: list[NumberedSplit], windows: Windows, world: int, first: int, end: int
) -> list[list[tuple[int, int]]]:
    """The global batches of steps [first, end), each sorted by sample id."""
    streams = [Stream(splits, windows, rank, world).shares(first, end) for rank in range(world)]
    return [sorted(row for share in shares for row in rows(share)) for shares in zip(*streams, strict=True)]


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(specs(), st.data())
def test_one_data_set(spec: OrderSpec, data: st.DataObject) -> None:
    windows, splits = EpochWindows(spec), [NumberedSplit(spec.sequences)]
    epochs = data.draw(st.integers(1, 3))
    steps = epochs * windows.steps_per_epoch
    one, *others = world_sizes(spec)
    whole = read(splits, windows, one, 0, steps)
    for epoch in range(epochs):
        batches = whole[epoch * windows.steps_per_epoch : (epoch + 1) * windows.steps_per_epoch]
        assert sorted(number for batch in batches for _, number in batch) == list(range(spec.sequences))
    assert [len(batch) for batch in whole] == [windows.real_sequences(step) for step in range(steps)]
    for world in others:
        assert read(splits, windows, world, 0, steps) == whole
    # Stopped anywhere and gone on with any number of workers, again and again, the run is the same.
    stops = sorted(data.draw(st.lists(st.integers(0, steps), max_size=4)))
    pieces = [
        read(splits, windows, data.draw(st.sampled_from([one, *others])), first, end)
        for first, end in zip([0, *stops], [*stops, steps], strict=True)
    ]
    assert [batch for piece in pieces for batch in piece] == whole


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(specs(smallest=2), st.lists(st.floats(0.01, 100.0), min_size=1, max_size=4), st.data())
def test_a_mixture(spec: OrderSpec, weights: list[float], data: st.DataObject) -> None:
    length_groups = max(spec.length_groups, -(-(len(weights) ** 2) // spec.group_sequences))
    spec = dataclasses.replace(spec, length_groups=length_groups)
    sizes = [data.draw(st.integers(spec.streams, 300)) for _ in weights]
    each = [dataclasses.replace(spec, sequences=size, manifest_hash=f"{i:032x}") for i, size in enumerate(sizes)]
    windows, splits = MixtureWindows(each, weights), [NumberedSplit(n, i) for i, n in enumerate(sizes)]
    steps = spec.length_groups * data.draw(st.integers(1, 6))
    whole = read(splits, windows, 1, 0, steps)
    assert all(len(batch) == spec.batch_sequences for batch in whole)
    for world in world_sizes(spec)[1:]:
        assert read(splits, windows, world, 0, steps) == whole
    stop = data.draw(st.integers(0, steps))
    assert read(splits, windows, 1, 0, stop) + read(splits, windows, 1, stop, steps) == whole
    drawn = np.array([number for batch in whole for _, number in batch])
    counts = np.bincount(drawn // BASE, minlength=len(weights))
    assert counts.tolist() == windows.sequences_by_component(steps)
    # The shares are exact to less than a sequence a stream and data set.
    wanted = np.array(weights) / sum(weights) * len(drawn)
    assert np.abs(counts - wanted).max() <= spec.streams * len(weights)
    for component, size in enumerate(sizes):
        # A stream repeats a sequence only when it has been through all of its own.
        times = np.bincount(drawn[drawn // BASE == component] % BASE, minlength=size)
        longest = max(each[component].stream_sequences(s) for s in range(spec.streams))
        shortest = min(each[component].stream_sequences(s) for s in range(spec.streams))
        taken = counts[component] // spec.streams
        assert times.max() <= -(-taken // shortest) + 1
        assert times.min() >= taken // longest - 1


def test_a_mixture_of_one_goes_through_epoch_after_epoch() -> None:
    spec = OrderSpec(96, "0" * 32, 3, 4, 8, 3, 5, 24)
    drawn = [n for batch in read([NumberedSplit(96)], MixtureWindows([spec], [2.0]), 2, 0, 24) for _, n in batch]
    assert sorted(drawn[:96]) == sorted(drawn[96:]) == list(range(96))
    assert drawn[:96] != drawn[96:]


def test_lengths_are_alike_in_a_mixed_batch() -> None:
    spec = OrderSpec(5000, "0" * 32, 3, 4, 32, 64, 50, 600)
    specs = [spec, dataclasses.replace(spec, sequences=800, manifest_hash="f" * 32)]
    windows = MixtureWindows(specs, [0.7, 0.3])
    spread = []
    for share in Stream([NumberedSplit(5000), NumberedSplit(800, 1)], windows, 0, 1).shares(0, 128):
        spread.append(np.ptp(share.sequences.lengths))
    assert np.mean(spread) < 1.0
