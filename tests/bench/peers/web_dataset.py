"""Stock webdataset: over our shards by sequence and by member, and over tars of one text a sequence."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import tokenizers
import webdataset as wds
from peers.contract import SHUFFLE_SEQUENCES, Epoch, Setting
from peers.corpus import made_once
from peers.padding import Padded, pad_flat, pad_rows

_TEXT_SHARD_SEQUENCES = 100_000
# About as many sequences as the buffer of single ones holds, in members of 1,024.
_SHUFFLE_MEMBERS = 16
_UNK_ID, _EOS_ID = 3, 2


def open_webdataset(setting: Setting) -> Epoch:
    """Members decoded with pyarrow, cut into sequences, shuffled through a buffer, batched."""

    def epoch(number: int) -> Iterator[Padded]:
        return iter(
            _shards(setting.folder / "ours", number)
            .compose(_sequences)
            .shuffle(SHUFFLE_SEQUENCES, initial=SHUFFLE_SEQUENCES, seed=number)
            .batched(setting.batch_sequences, collation_fn=pad_rows)
        )

    return epoch


def open_webdataset_members(setting: Setting) -> Epoch:
    """Members shuffled through a buffer; sequences permuted and batched a buffer of members at a time."""

    def epoch(number: int) -> Iterator[Padded]:
        members = _shards(setting.folder / "ours", number).compose(_flat)
        return iter(members.compose(lambda flat: _vector_batches(flat, setting.batch_sequences, number)))

    return epoch


def open_webdataset_text(setting: Setting) -> Epoch:
    """One text member a sequence; a batch is tokenised at once."""
    folder = made_once(setting.folder / "webdataset_text", lambda path: _write_texts(setting.folder, path))
    tokenizer = tokenizers.Tokenizer.from_file(str(setting.folder / "ours" / "tokenizer.json"))

    def collate(texts: list[bytes]) -> Padded:
        encoded = tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        ids = [[*encoding.ids, _EOS_ID] for encoding in encoded]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return pad_flat(np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths)

    def epoch(number: int) -> Iterator[Padded]:
        return iter(
            _shards(folder, number)
            .compose(lambda samples: (sample["txt"] for sample in samples))
            .shuffle(SHUFFLE_SEQUENCES, initial=SHUFFLE_SEQUENCES, seed=number)
            .batched(setting.batch_sequences, collation_fn=collate)
        )

    return epoch


def _shards(folder: Path, epoch: int) -> wds.WebDataset:
    """All tars of a folder in the epoch's order."""
    paths = sorted(map(str, folder.glob("train-*.tar")))
    random.Random(epoch).shuffle(paths)
    return wds.WebDataset(paths, shardshuffle=False, empty_check=False)


def _flat(samples: Iterable[dict[str, bytes]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and offsets of each member."""
    for sample in samples:
        with pa.ipc.open_stream(sample["arrow"]) as stream:
            column = stream.read_next_batch().column(0)
        yield column.values.to_numpy(), column.offsets.to_numpy()


def _sequences(samples: Iterable[dict[str, bytes]]) -> Iterator[np.ndarray]:
    for tokens, offsets in _flat(samples):
        bounds = offsets.tolist()
        yield from map(tokens.__getitem__, map(slice, bounds, bounds[1:]))


def _vector_batches(
    members: Iterable[tuple[np.ndarray, np.ndarray]], batch_sequences: int, epoch: int
) -> Iterator[Padded]:
    rng = np.random.default_rng(epoch)
    members = iter(members)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    while chunk := list(itertools.islice(members, _SHUFFLE_MEMBERS)):
        tokens, lengths = _joined([*kept, *chunk])
        order, starts = rng.permutation(len(lengths)), np.cumsum(lengths) - lengths
        full = len(order) - len(order) % batch_sequences
        for first in range(0, full, batch_sequences):
            yield pad_flat(*_take(tokens, starts, lengths, order[first : first + batch_sequences]))
        rest, rest_lengths = _take(tokens, starts, lengths, order[full:])
        kept = [(rest, np.concatenate([[0], np.cumsum(rest_lengths)]))]
    if kept and len(kept[0][1]) > 1:
        yield pad_flat(*_joined(kept))


def _joined(members: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Flat tokens of all members, and the lengths int64 of their sequences."""
    lengths = np.concatenate([np.diff(offsets) for _, offsets in members]).astype(np.int64)
    return np.concatenate([tokens for tokens, _ in members]), lengths


def _take(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Flat tokens and lengths of the chosen sequences."""
    wanted = lengths[chosen]
    ends = np.cumsum(wanted)
    total = int(ends[-1]) if len(ends) else 0
    return tokens[np.repeat(starts[chosen] - (ends - wanted), wanted) + np.arange(total)], wanted


def _write_texts(corpus: Path, folder: Path) -> None:
    lines = (corpus / "corpus" / "train.txt").read_bytes().splitlines()
    for shard, first in enumerate(range(0, len(lines), _TEXT_SHARD_SEQUENCES)):
        with wds.TarWriter(str(folder / f"train-{shard:06d}.tar"), encoder=False) as tar:
            for number, text in enumerate(lines[first : first + _TEXT_SHARD_SEQUENCES], first):
                tar.write({"__key__": f"{number:09d}", "txt": text})
