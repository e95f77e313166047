"""Stage `sample`: the texts that a tokenizer is trained on, the training split or a sample of it.

A sample holds all texts whose hash is below a limit, which is as high as a number of characters allows. Samples of
parts can be merged: however the corpus is divided among workers, the sample of the whole is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from vae_dist.data.prepare.deduplicate import Drops
from vae_dist.data.prepare.texts import SPLITS, batches_of
from vae_dist.data.prepare.work import Record, Stages
from vae_dist.data.source.pieces import Piece
from vae_dist.data.source.sources import Source
from vae_dist.data.store.folder import Folder

# Bounds the memory of the training.
SAMPLE_CHARACTERS = 1 << 26
# A text that is longer counts with its beginning: one book is no sample.
_TEXT_CHARACTERS = 1 << 20
_SCHEMA = pa.schema([("digest", pa.uint64()), ("text", pa.large_string())])


class Smallest:
    """The texts whose hash is below a limit, in the order they came in; the limit falls when they become too many.

    Attributes:
        limit: all texts with a smaller hash are kept, and no others.
    """

    def __init__(self, characters: int, limit: int = 1 << 64) -> None:
        """Keeps at most so many characters."""
        self._characters = characters
        self.limit = limit
        self._kept: list[tuple[int, str]] = []
        self._size = 0

    def add(self, digest: int, text: str) -> None:
        """Offer one text."""
        if digest < self.limit:
            self._kept.append((digest, text))
            self._size += len(text)
            if self._size > 2 * self._characters:
                self._shrink()

    def items(self) -> list[tuple[int, str]]:
        """(hash, text) of what is kept."""
        self._shrink()
        return self._kept

    def _shrink(self) -> None:
        digests = np.array([digest for digest, _ in self._kept], dtype=np.uint64)
        order = np.argsort(digests, kind="stable")
        sizes = np.cumsum(np.array([len(text) for _, text in self._kept], dtype=np.int64)[order])
        count = int(np.searchsorted(sizes, self._characters, side="right"))
        if count < len(order):
            # Equal texts are kept or left out together.
            self.limit = min(self.limit, int(digests[order[count]]))
        self._kept = [(digest, text) for digest, text in self._kept if digest < self.limit]
        self._size = sum(len(text) for _, text in self._kept)


@dataclass(frozen=True)
class Sample:
    """The stage's function.

    Attributes:
        limit: texts with this hash or a larger one are left out from the start: little of a large corpus is kept.
        characters: largest sample of a group.
    """

    source: Source
    work: Folder
    drops: Drops | None
    limit: int
    characters: int

    def __call__(self, number: int, pieces: Sequence[Piece]) -> Record:
        """Write the sample of a group; returns the limit of its hashes, and how many texts it went through."""
        smallest, texts = Smallest(self.characters, self.limit), 0
        dropped = self.drops.of_group(number) if self.drops else None
        for batch in batches_of(self.source, pieces, Counter(), dropped):
            texts += len(batch)
            for row in np.flatnonzero(batch.splits == SPLITS.index("train")).tolist():
                text = batch.texts[row]
                smallest.add(xxhash.xxh3_64_intdigest(text.encode()), text[:_TEXT_CHARACTERS])
        items = smallest.items()
        columns = [
            pa.array([digest for digest, _ in items], type=pa.uint64()),
            pa.array([text for _, text in items], type=pa.large_string()),
        ]
        with self.work.writing(_file(number)) as stream, pa.ipc.new_stream(stream, _SCHEMA) as sink:
            sink.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        return {"texts": texts, "limit": smallest.limit}


def sample_training_texts(
    stages: Stages,
    source: Source,
    groups: Sequence[Sequence[Piece]],
    sizes: Sequence[int],
    drops: Drops | None,
) -> list[str]:
    """The training split's texts, or a sample of at most SAMPLE_CHARACTERS, in the order of the source.

    Args:
        sizes: bytes of each group.
    """
    # Twice what is wanted: not all bytes are text of the training split. Compressed files hold more than their size.
    share = min(1.0, 2 * SAMPLE_CHARACTERS / max(1, sum(sizes)))
    limit = 1 << 64 if share == 1.0 else int(share * 2**64)
    sample = Sample(source, stages.work, drops, limit, SAMPLE_CHARACTERS)
    records = stages.finish("sample", sample, groups, sizes)
    smallest = Smallest(SAMPLE_CHARACTERS, min((record["limit"] for record in records), default=limit))
    for number in range(len(groups)):
        for digest, text in _read(stages.work, number):
            smallest.add(digest, text)
    return [text for _, text in smallest.items()]


def _read(work: Folder, number: int) -> Iterator[tuple[int, str]]:
    batch = pa.ipc.open_stream(work.read(_file(number))).read_all()
    return zip(*(batch.column(name).to_pylist() for name in _SCHEMA.names), strict=True)


def _file(number: int) -> str:
    return f"sample-{number:06d}.arrow"
