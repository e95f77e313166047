"""The texts of a group of pieces, as every stage of a prepare sees them: in order, with their split, in batches."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source.line_batches import line_batches
from vae_dist.data.source.pieces import Piece
from vae_dist.data.source.sources import Source
from vae_dist.data.text.normalise import normalising_steps

_Splits = list[str | None] | str | None
SPLITS = ("train", "valid", "test")
_TRAIN, _VALID, _TEST = range(3)
_BATCH_TEXTS, _BATCH_CHARACTERS = 4096, 1 << 20


@dataclass(frozen=True)
class Batch:
    """Some texts.

    Attributes:
        splits: int8, the place of each one's split in SPLITS.
    """

    texts: list[str]
    splits: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


def batches_of(
    source: Source, pieces: Sequence[Piece], counts: Counter[str], dropped: np.ndarray | None = None
) -> Iterator[Batch]:
    """All texts of a group. A batch is bounded by about a megabyte, but for single texts that are longer.

    Args:
        counts: `empty_texts`, `filtered_texts` and `duplicate_texts` are counted in here.
        dropped: numbers, in the group, of the texts to leave out; ascending.

    Raises:
        DataError: the source is not readable.
    """
    options, first = source.options, 0
    for piece in pieces:
        for given, texts in _read(source, piece, counts):
            end = first + len(texts)
            if dropped is not None and len(dropped):
                given, texts = _without(given, texts, dropped, first)
                counts["duplicate_texts"] += end - first - len(texts)
            first = end
            if texts:
                yield Batch(texts, _split_codes(given, texts, options))


def _read(source: Source, piece: Piece, counts: Counter[str]) -> Iterator[tuple[_Splits, list[str]]]:
    """Texts and their splits: one for each, or one for all; None is decided by the text's hash."""
    options = source.options
    is_plain = not normalising_steps(options) and options.keyword is None
    if piece.format == "text" and options.record == "line" and is_plain:
        yield from ((piece.split, texts) for texts in line_batches(source.filesystem, piece, counts))
        return
    splits: list[str | None] = []
    texts: list[str] = []
    characters = 0
    for split, text in source.read(piece, counts):
        splits.append(split)
        texts.append(text)
        characters += len(text)
        if len(texts) == _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield splits, texts
            splits, texts, characters = [], [], 0
    yield splits, texts


def _without(splits: _Splits, texts: list[str], dropped: np.ndarray, first: int) -> tuple[_Splits, list[str]]:
    """The texts that are not dropped, of which the first has the number `first`."""
    start, stop = np.searchsorted(dropped, [first, first + len(texts)])
    is_kept = np.ones(len(texts), dtype=bool)
    is_kept[dropped[start:stop] - first] = False
    if isinstance(splits, list):
        splits = list(itertools.compress(splits, is_kept))
    return splits, list(itertools.compress(texts, is_kept))


def _split_codes(given: _Splits, texts: list[str], options: PrepareConfig) -> np.ndarray:
    if isinstance(given, str):
        return np.full(len(texts), SPLITS.index(given), dtype=np.int8)
    codes = _hashed_splits(texts, options)
    if isinstance(given, list):
        codes = np.array(
            [code if split is None else SPLITS.index(split) for split, code in zip(given, codes.tolist(), strict=True)],
            dtype=np.int8,
        )
    return codes


def _hashed_splits(texts: list[str], options: PrepareConfig) -> np.ndarray:
    """int8: what `split_of` says of every text."""
    digests = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in texts], dtype=np.uint64)
    shares = digests / 2.0**64
    codes = np.full(len(texts), _TRAIN, dtype=np.int8)
    codes[shares < options.test_fraction + options.valid_fraction] = _VALID
    codes[shares < options.test_fraction] = _TEST
    return codes
