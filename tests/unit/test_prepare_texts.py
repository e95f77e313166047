"""What the stages of a prepare see: the same texts as the source gives one by one, in any cut, and their splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.sampling import Smallest
from vae_dist.data.prepare.texts import SPLITS, batches_of
from vae_dist.data.source import lines
from vae_dist.data.source.line_batches import line_batches
from vae_dist.data.source.sources import open_source, split_of
from vae_dist.errors import DataError


@given(
    raw=st.text(st.sampled_from("ab é\U0001f600\u2028\ufeff\r\n\n\n"), max_size=60).map(str.encode),
    block=st.integers(1, 20),
    target=st.integers(1, 30),
)
@settings(max_examples=200, deadline=None)
def test_line_batches_are_the_lines_of_the_source(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, block: int, target: int
) -> None:
    """For every piece, however the file is cut and in whatever blocks it comes."""
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(raw)
    source = open_source(str(path), PrepareConfig(), path.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_READ_BYTES", block)
        for piece in (piece for group in source.pieces(target) for piece in group):
            one_by_one, many = Counter[str](), Counter[str]()
            expected = [text for _, text in source.read(piece, one_by_one)]
            found = [text for texts in line_batches(source.filesystem, piece, many) for text in texts]
            assert found == expected
            assert +many == +one_by_one


def test_an_error_names_the_same_byte_either_way(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\ntwo é\n".encode() + b"th\xe3ee\nfour\n")
    source = open_source(str(path), PrepareConfig(), tmp_path)
    messages = []
    for read in (
        lambda p: list(source.read(p, Counter())),
        lambda p: list(line_batches(source.filesystem, p, Counter())),
    ):
        with pytest.raises(DataError, match=r"byte 0xe3 at offset 13\.") as caught:
            list(read(source.pieces(100)[0][0]))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("options", [{}, {"lowercase": True}, {"keyword": "seven"}])
def test_batches_hold_every_text_and_its_split(tmp_path: Path, options: dict[str, object]) -> None:
    """Through the fast way and the general one; dropped texts are those of the given numbers."""
    words = ("one", "Seven", "three")
    (tmp_path / "a.txt").write_text("\n".join(f"{words[i % 3]} {i}" for i in range(3000)) + "\n\n", encoding="utf-8")
    config = PrepareConfig(valid_fraction=0.2, test_fraction=0.3, **options)
    source = open_source(str(tmp_path / "a.txt"), config, tmp_path)
    expected = [text for _, text in source.texts()]
    dropped = np.array([0, 5, 6, 900])
    kept = [text for number, text in enumerate(expected) if number not in dropped.tolist()]
    for drops, texts in ((None, expected), (dropped, kept)):
        counts: Counter[str] = Counter()
        [group] = source.pieces(1 << 20)
        batches = list(batches_of(source, group, counts, drops))
        assert [text for batch in batches for text in batch.texts] == texts
        codes = [code for batch in batches for code in batch.splits.tolist()]
        assert [SPLITS[code] for code in codes] == [split_of(text, config) for text in texts]
        assert counts["duplicate_texts"] == len(expected) - len(texts)
        assert counts["empty_texts"] == 1
        assert counts["filtered_texts"] == 3000 - len(expected)


def test_the_split_of_the_source_stays(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.txt").write_text(f"a {name}\nb\n", encoding="utf-8")
    source = open_source(str(tmp_path), PrepareConfig(), tmp_path)
    found = {
        text: SPLITS[code]
        for group in source.pieces(1)
        for batch in batches_of(source, group, Counter())
        for text, code in zip(batch.texts, batch.splits.tolist(), strict=True)
    }
    assert found == {"a dev": "valid", "b": "train", "a train": "train"}


@given(
    items=st.lists(st.tuples(st.integers(0, 9), st.text("ab", min_size=1, max_size=9)), max_size=40),
    characters=st.integers(1, 60),
    cut=st.integers(0, 40),
)
def test_samples_of_parts_give_the_sample_of_the_whole(items: list[tuple[int, str]], characters: int, cut: int) -> None:
    """All texts below the largest limit that the number of characters allows, in their order."""

    def below(limit: int) -> list[tuple[int, str]]:
        return [item for item in items if item[0] < limit]

    limits = [limit for limit in range(11) if sum(len(text) for _, text in below(limit)) <= characters]
    expected = below(max(limits))
    parts = []
    for part in (items[:cut], items[cut:], items):
        smallest = Smallest(characters)
        for digest, text in part:
            smallest.add(digest, text)
        parts.append((smallest.items(), smallest.limit))
    merged = Smallest(characters, min(limit for _, limit in parts[:2]))
    for digest, text in [*parts[0][0], *parts[1][0]]:
        merged.add(digest, text)
    assert parts[2][0] == expected
    assert merged.items() == expected
