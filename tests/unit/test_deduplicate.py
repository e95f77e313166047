"""Duplicates: against sets in plain Python, and near ones against the Jaccard index that texts were made to have."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare import deduplicate
from vae_dist.data.prepare.minhash import KEYS_PER_TEXT, VALUES_PER_KEY, _shingles, _signatures, near_keys
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.store.dataset import Dataset

WHOLE = {"valid_fraction": 0.0, "test_fraction": 0.0}


def texts(dataset: Dataset) -> list[str]:
    split = dataset.split("train")
    return [dataset.tokenizer.decode(ids) for ids in split.read(0, split.sequences)]


def first_occurrences(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))


@given(
    numbers=st.lists(st.integers(0, 60), min_size=1, max_size=300),
    group=st.integers(20, 3000),
    run=st.integers(1, 50),
    bucket=st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_exact_duplicates_are_those_of_a_set(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], group: int, run: int, bucket: int
) -> None:
    """However many groups, runs of keys and buckets there are; the first occurrence stays, in its place."""
    folder = tmp_path_factory.mktemp("duplicates")
    lines = [f"text number {n}" for n in numbers]
    (folder / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deduplicate, "_RUN_KEYS", run)
        patch.setattr(deduplicate, "_BUCKET_KEYS", bucket)
        options = PrepareConfig(deduplicate="exact", tokenizer="word", vocab_size=100, **WHOLE)
        dataset = prepare(str(folder / "a.txt"), folder / "out", options, group_bytes=group)
    assert texts(dataset) == first_occurrences(lines)
    assert dataset.manifest["duplicate_texts"] == len(lines) - len(set(lines))


def test_nothing_is_dropped_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b\na b\na b\n", encoding="utf-8")
    dataset = prepare(str(tmp_path / "a.txt"), tmp_path / "out", PrepareConfig(**WHOLE))
    assert texts(dataset) == ["a b"] * 3
    assert dataset.manifest["duplicate_texts"] == 0


def jaccard(a: str, b: str) -> float:
    """Of the sets of three neighbouring words."""
    first, second = ({tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in (a.split(), b.split()))
    return len(first & second) / len(first | second)


def pair(rng: random.Random, common: int, own: int) -> tuple[str, str]:
    """Two texts that share `common` shingles and have `own` more each."""
    start = [f"w{rng.randrange(10**9)}" for _ in range(common + 2)]
    ends = ([f"w{rng.randrange(10**9)}" for _ in range(own)] for _ in range(2))
    a, b = (" ".join([*start, *end]) for end in ends)
    return a, b


@pytest.mark.parametrize(("common", "own"), [(20, 20), (28, 6), (32, 4), (36, 2), (40, 0)])
def test_smallest_hashes_agree_as_often_as_the_jaccard_index_says(common: int, own: int) -> None:
    rng = random.Random(common)
    count = 400
    agreeing = keys_found = 0
    for _ in range(count):
        a, b = pair(rng, common, own)
        expected = common / (common + 2 * own)
        assert jaccard(a, b) == pytest.approx(expected)
        first, second = _signatures([_shingles(a), _shingles(b)])
        agreeing += int((first == second).sum())
        keys = near_keys([a, b])
        keys_found += bool((keys[0] == keys[1]).all(axis=-1).any())
    hashes = KEYS_PER_TEXT * VALUES_PER_KEY
    # Five standard deviations of a binomial; the hash functions of a pair are not quite independent.
    assert (
        abs(agreeing / (count * hashes) - expected) <= 5 * (expected * (1 - expected) / (count * hashes)) ** 0.5 + 0.01
    )
    found = 1 - (1 - expected**VALUES_PER_KEY) ** KEYS_PER_TEXT
    assert abs(keys_found / count - found) <= 5 * (found * (1 - found) / count) ** 0.5 + 0.02


def test_keys_of_different_bands_never_meet() -> None:
    """A text of one shingle has the same smallest value nowhere, and eight keys that differ."""
    keys = near_keys(["alone"])[0]
    assert len({tuple(key) for key in keys.tolist()}) == KEYS_PER_TEXT


def test_short_texts_and_punctuation() -> None:
    same = near_keys(["Two words", "two words!", "two, words", "words two", "...", "!!!", ""])
    assert np.array_equal(same[0], same[1])
    assert np.array_equal(same[0], same[2])
    assert not (same[0] == same[3]).all(axis=-1).any()
    assert not (same[4] == same[5]).all(axis=-1).any()


@pytest.mark.long
@pytest.mark.parametrize("group_bytes", [200, 2000, 1 << 20])
def test_near_duplicates_are_dropped(tmp_path: Path, group_bytes: int) -> None:
    """What a plain loop over the keys drops: a text of which an earlier one, kept or not, has a key."""
    rng = random.Random(7)
    lines = []
    for _ in range(60):
        base = [f"v{rng.randrange(10**6)}" for _ in range(30)]
        lines.append(" ".join(base))
        lines.append(" ".join([*base[:-1], "changed"]))
        lines.append(" ".join([*base[:10], *(f"v{rng.randrange(10**6)}" for _ in range(20))]))
    rng.shuffle(lines)
    seen: set[tuple[int, int]] = set()
    expected = []
    for line in lines:
        keys = {(high, low) for high, low in near_keys([line])[0].tolist()}
        if not keys & seen:
            expected.append(line)
        seen |= keys
    # One of each pair that differs in its last word (J = 27/29) is gone, nearly always; others (J < 0.2) stay.
    assert 118 <= len(expected) <= 122
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    options = PrepareConfig(deduplicate="near", tokenizer="word", vocab_size=20_000, **WHOLE)
    dataset = prepare(str(tmp_path / "a.txt"), tmp_path / "out", options, group_bytes=group_bytes)
    assert texts(dataset) == expected
    assert dataset.manifest["duplicate_texts"] == 180 - len(expected)
