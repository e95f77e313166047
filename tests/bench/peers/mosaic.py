"""Mosaic Streaming: one MDS sample a sequence, read from the local folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from peers.contract import Epoch, Setting
from peers.corpus import made_once
from peers.padding import Padded, pad_rows
from torch.utils.data import DataLoader

try:
    import torchvision  # noqa: F401 - streaming imports it for its image data sets
except RuntimeError:
    # It was built for a torch with CUDA and finds one without: declaring the operators that it asks for is enough.
    for _operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")

from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory


def open_mosaic(setting: Setting) -> Epoch:
    """Uncompressed shards, shuffled by `py1e`, one canonical node."""
    folder = made_once(setting.folder / "mosaic", lambda path: _write(setting, path))
    # Shared memory of a run that was killed would stop this one.
    clean_stale_shared_memory()
    dataset = StreamingDataset(
        local=str(folder),
        batch_size=setting.batch_sequences,
        shuffle=True,
        shuffle_algo="py1e",
        num_canonical_nodes=1,
    )
    loader = DataLoader(dataset, setting.batch_sequences, collate_fn=_collate)

    def epoch(_number: int) -> Iterator[Padded]:
        return iter(loader)

    return epoch


def _collate(samples: list[dict[str, np.ndarray]]) -> Padded:
    return pad_rows([sample["tokens"] for sample in samples])


def _write(setting: Setting, folder: Path) -> None:
    with MDSWriter(out=str(folder), columns={"tokens": "ndarray:uint16"}) as writer:
        for row in setting.rows():
            writer.write({"tokens": row})
