"""Random damage to any file of a data set: the right tokens or a clear error, never anything between.

What counts as right after damage to manifest.json: every split that is opened holds exactly the tokens that were
written, in order. Lint must say something about every change of a shard, a table or the tokenizer, and about every
change of the manifest that is more than a description (`DESCRIPTIONS` below, and white space).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import all_rows, some_rows, write_dataset

from vae_dist.config.schema import Config
from vae_dist.data.store.lint import lint
from vae_dist.data.stream.training_data import open_training_data
from vae_dist.errors import VaeDistError

ROWS = {"train": some_rows(60, 0), "valid": some_rows(12, 1)}
TRUTH = {name: [tuple(row) for row in rows] for name, rows in ROWS.items()}
CONFIG = Config.model_validate({"data": {"streams": 2}, "train": {"batch_sequences": 6}})
KINDS = ("flip", "insert", "delete", "zero")
LIMIT_SECONDS = 30.0
# Nobody can tell from the shards whether these are true.
DESCRIPTIONS = ("source", "options", "empty_texts", "filtered_texts", "duplicate_texts")
SPLIT_DESCRIPTIONS = ("texts", "truncated", "dropped", "split")


class Target:
    """A data set, one of whose files is damaged at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.names = list(self.whole)
        self.outcomes: Counter[str] = Counter()

    def examine(self, name: str, damaged: bytes) -> None:
        """Everything that must hold for one damaged file; mends it afterwards."""
        if damaged == self.whole[name]:
            return
        self.write(name, damaged)
        pool = ThreadPoolExecutor(1)
        try:
            # A hang is an error here: the test must not wait for it.
            pool.submit(self._check, name, damaged).result(LIMIT_SECONDS)
        finally:
            pool.shutdown(wait=False)
            self.write(name, self.whole[name])

    def write(self, name: str, data: bytes) -> None:
        """As a new file: a stream of the case before may still read ahead, and a map must not shrink under it."""
        (self.folder / ".new").write_bytes(data)
        (self.folder / ".new").replace(self.folder / name)

    def _check(self, name: str, damaged: bytes) -> None:
        for read in (self._read_in_order, self._stream_an_epoch):
            try:
                read()
                self.outcomes["right"] += 1
            except VaeDistError as error:
                assert len(error.message) > 20
                self.outcomes["error"] += 1
        try:
            problems = lint(self.folder)["problems"]
        except VaeDistError as error:
            raise AssertionError(f"lint gave up: {error.message}") from error
        if name != "manifest.json" or facts(damaged) != facts(self.whole[name]):
            assert problems, f"lint is content with a damaged {name}"
        if name.endswith(".tar"):
            assert {problem["shard"] for problem in problems} == {name}

    def _read_in_order(self) -> None:
        assert all_rows(self.folder) == TRUTH

    def _stream_an_epoch(self) -> None:
        data = open_training_data([str(self.folder)], CONFIG, workers=1)
        shares = data.stream(0, 1).shares(0, data.windows.steps_per_epoch)
        assert Counter(tuple(row.tolist()) for share in shares for row in share.sequences) == Counter(TRUTH["train"])


def facts(manifest: bytes) -> Any:
    """A manifest without its descriptions; None when it is none."""
    try:
        kept = json.loads(manifest)
        # What is in them may be wrong, but they must be there.
        kept |= {key: None for key in DESCRIPTIONS if key in kept}
        for split in kept["splits"].values():
            split |= {key: None for key in SPLIT_DESCRIPTIONS if key in split}
        # As text: in Python 1 equals 1.0 and True.
        return json.dumps(kept)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def damage(data: bytes, kind: str, place: int, size: int, filling: bytes) -> bytes:
    """`size` bytes from `place` on flipped, deleted or zeroed; or the filling inserted there."""
    if kind == "insert":
        return data[:place] + filling + data[place:]
    piece = data[place : place + size]
    # A filling shorter than the piece flips its beginning only.
    flipped = bytes(a ^ (b or 1) for a, b in zip(piece, filling, strict=False)) + piece[len(filling) :]
    mended = {"delete": b"", "zero": bytes(len(piece)), "flip": flipped}
    return data[:place] + mended[kind] + data[place + size :]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    target = Target(write_dataset(tmp_path_factory.mktemp("fuzz") / "data", ROWS, member_sequences=6))
    assert lint(target.folder)["problems"] == []
    target._read_in_order()
    target._stream_an_epoch()
    return target


def fuzz(target: Target, seed: int, seconds: float) -> int:
    draw, until, cases = np.random.default_rng(seed), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        # Half of the damage to the small files: these hold what decides everything else.
        small = [name for name in target.names if not name.endswith(".tar")]
        name = str(draw.choice(small if draw.random() < 0.5 else target.names))
        size = int(draw.choice([1, 1, 1, 2, 8, 64, 600]))
        place = int(draw.integers(0, len(target.whole[name])))
        kind, filling = str(draw.choice(KINDS)), draw.integers(0, 256, size, dtype=np.uint8).tobytes()
        try:
            target.examine(name, damage(target.whole[name], kind, place, size, filling))
        except Exception as error:
            raise AssertionError(f"case {cases} of seed {seed}: {kind} {size} bytes at {place} of {name}") from error
        cases += 1
    return cases


def test_damage_drawn_by_seed(target: Target) -> None:
    cases = fuzz(target, 0, 8)
    assert cases > 30
    assert target.outcomes["right"] and target.outcomes["error"] > cases


@pytest.mark.long
@pytest.mark.timeout(300)
def test_much_damage_drawn_by_seed(target: Target) -> None:
    for seed in (1, 2):
        assert fuzz(target, seed, 30) > 100


DAMAGE = st.tuples(
    st.integers(0, 10**6),
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.integers(1, 700),
    st.binary(min_size=1, max_size=8),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DAMAGE)
def test_damage_drawn_by_hypothesis(target: Target, drawn: tuple[int, str, int, int, bytes]) -> None:
    number, kind, place, size, filling = drawn
    name = target.names[number % len(target.names)]
    data = target.whole[name]
    target.examine(name, damage(data, kind, place % len(data), size, filling))


def test_lint_notices_every_byte_of_a_shard(target: Target) -> None:
    """One bit of each byte; also of those that no reader looks at, such as the blocks at the end."""
    name = "valid-000000.tar"
    data = target.whole[name]
    for place in range(0, len(data), 37):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        target.write(name, bytes(damaged))
        assert {problem["shard"] for problem in lint(target.folder)["problems"]} == {name}
    target.write(name, data)
