"""LitData: one item a sequence, and its TokensLoader, which packs tokens into blocks of one size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize
from peers.contract import PACKED_BLOCK_TOKENS, Epoch, Setting
from peers.corpus import made_once
from peers.padding import Padded, pad_rows

_CHUNK_BYTES = "64MB"
_PIECES = 16


def open_litdata(setting: Setting) -> Epoch:
    """Items of raw numpy bytes, shuffled by LitData's chunk and item permutations."""
    folder = made_once(setting.folder / "litdata", lambda path: _write_items(setting, path))
    dataset = StreamingDataset(str(folder), shuffle=True, drop_last=False)
    loader = StreamingDataLoader(dataset, batch_size=setting.batch_sequences, collate_fn=pad_rows)

    def epoch(_number: int) -> Iterator[Padded]:
        return iter(loader)

    return epoch


def open_litdata_packed(setting: Setting) -> Epoch:
    """Blocks of one size: as many a batch as hold about the tokens of `batch_sequences` sequences."""
    folder = made_once(setting.folder / "litdata_packed", lambda path: _write_blocks(setting, path))
    tokens, offsets = setting.flat()
    mean = len(tokens) / (len(offsets) - 1)
    blocks = max(1, round(setting.batch_sequences * mean / PACKED_BLOCK_TOKENS))
    loads = TokensLoader(block_size=PACKED_BLOCK_TOKENS)
    dataset = StreamingDataset(str(folder), item_loader=loads, shuffle=True, drop_last=False)
    loader = StreamingDataLoader(dataset, batch_size=blocks, collate_fn=_stack)

    def epoch(_number: int) -> Iterator[Padded]:
        return iter(loader)

    return epoch


def _stack(blocks: list[torch.Tensor]) -> Padded:
    tokens = torch.stack(blocks).long()
    return tokens, torch.full((len(blocks),), tokens.shape[1])


def _write_items(setting: Setting, folder: Path) -> None:
    tokens, offsets = setting.flat()
    _optimize(_Items(tokens, offsets), np.array_split(np.arange(len(offsets) - 1), _PIECES), folder, None)


def _write_blocks(setting: Setting, folder: Path) -> None:
    tokens, _ = setting.flat()
    ends = [len(tokens) * piece // _PIECES // PACKED_BLOCK_TOKENS * PACKED_BLOCK_TOKENS for piece in range(_PIECES + 1)]
    pieces = list(itertools.pairwise(ends))
    _optimize(_Blocks(tokens), pieces, folder, TokensLoader(block_size=PACKED_BLOCK_TOKENS))


class _Items:
    def __init__(self, tokens: np.ndarray, offsets: np.ndarray) -> None:
        self._tokens, self._offsets = tokens, offsets

    def __call__(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        for i in numbers:
            yield np.array(self._tokens[self._offsets[i] : self._offsets[i + 1]])


class _Blocks:
    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def __call__(self, piece: tuple[int, int]) -> Iterator[torch.Tensor]:
        yield torch.from_numpy(np.array(self._tokens[slice(*piece)]))


def _optimize(function: object, inputs: list, folder: Path, loader: TokensLoader | None) -> None:
    optimize(
        fn=function, inputs=inputs, output_dir=str(folder), chunk_bytes=_CHUNK_BYTES, num_workers=1, item_loader=loader
    )
