"""What a contender is: a function that opens the corpus and returns its passes over it; and the list of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peers.padding import Padded

# Epoch number, from 0, to its batches in a shuffled order.
Epoch = Callable[[int], Iterator[Padded]]
SHUFFLE_SEQUENCES = 10_000
PACKED_BLOCK_TOKENS = 2048


@dataclass(frozen=True)
class Setting:
    """Where the corpus lies, and the sequences of a batch.

    Attributes:
        folder: as `make_corpus` leaves it; a contender keeps its own format in a folder of its name there.
    """

    folder: Path
    batch_sequences: int

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens uint16[N] as a memory map, offsets int64[n + 1]."""
        return np.load(self.folder / "tokens.npy", mmap_mode="r"), np.load(self.folder / "offsets.npy")

    def rows(self) -> Iterator[np.ndarray]:
        """One uint16 array a sequence, for writing a peer's format."""
        tokens, offsets = self.flat()
        return iter(np.split(np.array(tokens), offsets[1:-1]))


@dataclass(frozen=True)
class Entry:
    """A contender's place.

    Attributes:
        module: the module in `peers`, whose function `open_NAME` takes a Setting and returns its Epoch.
        environment: the virtual environment it runs in, `project` or one with a requirements file here.
        packages: distributions whose versions are reported.
        note: how it reads, for the table.
        same_job: False when it does not keep sequences apart.
    """

    module: str
    environment: str
    packages: tuple[str, ...]
    note: str
    same_job: bool = True


CONTENDERS = {
    "ours": Entry("ours", "project", ("vae_dist",), "Stream.shares with its read-ahead, global shuffle by blocks"),
    "webdataset": Entry(
        "web_dataset", "project", ("webdataset", "pyarrow"), "the same shards, unbatched, shuffle buffer"
    ),
    "webdataset_members": Entry(
        "web_dataset", "project", ("webdataset", "pyarrow"), "the same shards, shuffled by member and within"
    ),
    "webdataset_text": Entry(
        "web_dataset", "project", ("webdataset", "tokenizers"), "a text member a sequence, tokenised, shuffle buffer"
    ),
    "mosaic": Entry("mosaic", "mosaic", ("mosaicml-streaming",), "MDS, a sample a sequence, py1e shuffle"),
    "litdata": Entry("lit_data", "arrow", ("litdata",), "an item a sequence, shuffled"),
    "litdata_packed": Entry(
        "lit_data", "arrow", ("litdata",), "TokensLoader: packed blocks, no sequences, no padding", same_job=False
    ),
    "datasets": Entry("hugging_face", "arrow", ("datasets", "pyarrow"), "Arrow, shuffled, batched reads"),
    "ray_data": Entry("ray_data", "project", ("ray", "pyarrow"), "Parquet, iter_torch_batches, local shuffle buffer"),
}
