"""Duplicates, found outside memory: a text is dropped when an earlier one (in source order) has an equal key.

Two stages. `fingerprints`: every group writes the keys of its texts, sorted, with the texts' numbers. `duplicates`:
the keys are divided into buckets by their first bits; a bucket reads its share of every group's keys, in the order of
the groups, and writes down which texts are not the first with their key. Memory is bounded by the size of a run of
keys and of a bucket.

A text has one key when exact duplicates are looked for, the 128-bit hash of the text, and several when near ones are,
see `minhash.py`. A text that equals one that was itself dropped is dropped, too: the result depends on nothing but the
texts and their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from vae_dist.data.prepare.minhash import KEYS_PER_TEXT, near_keys
from vae_dist.data.prepare.texts import batches_of
from vae_dist.data.prepare.work import Record, Stages
from vae_dist.data.source.pieces import Piece
from vae_dist.data.source.sources import Source
from vae_dist.data.store.folder import Folder

# The first 12 bits of a key; a run begins with where each of their values starts, int64[4097].
_PREFIX_BITS = 12
_PREFIXES = 1 << _PREFIX_BITS
_RUN_KEYS = 1 << 20
_BUCKET_KEYS = 1 << 20
_KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
_HEAD_BYTES = 8 * (_PREFIXES + 1)
_RUNS_FILE = "fingerprints.runs"


@dataclass(frozen=True)
class Drops:
    """The texts to leave out, as the stage `duplicates` wrote them down.

    Attributes:
        groups, buckets: how many there are.
    """

    work: Folder
    groups: int
    buckets: int

    def of_group(self, number: int) -> np.ndarray:
        """int64, ascending: the numbers of the texts of a group that are duplicates of earlier ones."""
        found = [np.empty(0, dtype=np.int64)]
        for bucket in range(self.buckets):
            with self.work.opened(_drops_file(bucket)) as read:
                start, stop = np.frombuffer(read(8 * number, 16), dtype="<i8").tolist()
                if stop > start:
                    rows = read(8 * (self.groups + 1 + start), 8 * (stop - start))
                    found.append(np.frombuffer(rows, dtype="<i8"))
        # With several keys a text may be a duplicate several times.
        return np.unique(np.concatenate(found))


def find_duplicates(stages: Stages, source: Source, groups: Sequence[Sequence[Piece]], sizes: Sequence[int]) -> Drops:
    """Run both stages."""
    records = stages.finish("fingerprints", Fingerprint(source, stages.work), groups, sizes)
    runs = [(group, *run) for group, record in enumerate(records) for run in record["runs"]]
    keys = sum(count for _, _, count in runs)
    # A power of two, so that a bucket is a range of prefixes.
    buckets = min(_PREFIXES, 1 << max(0, -(-keys // _BUCKET_KEYS) - 1).bit_length())
    stages.work.write(_RUNS_FILE, np.array(runs, dtype="<i8").tobytes())
    stages.finish("duplicates", FindInBucket(stages.work, len(groups), buckets), range(buckets), [1] * buckets)
    return Drops(stages.work, len(groups), buckets)


@dataclass(frozen=True)
class Fingerprint:
    """The function of the stage `fingerprints`."""

    source: Source
    work: Folder

    def __call__(self, number: int, pieces: Sequence[Piece]) -> Record:
        """Write a group's keys in runs, each sorted; returns texts, and [offset, keys] of each run."""
        is_near = self.source.options.deduplicate == "near"
        per_text = KEYS_PER_TEXT if is_near else 1
        counts: Counter[str] = Counter()
        texts = offset = held = 0
        runs: list[tuple[int, int]] = []
        parts: list[np.ndarray] = []
        with self.work.writing(_keys_file(number)) as stream:

            def flush() -> None:
                nonlocal offset, held, parts
                if held:
                    stream.write(_run(np.concatenate(parts)))
                    runs.append((offset, held))
                offset, held, parts = offset + _HEAD_BYTES + held * _KEY.itemsize, 0, []

            for batch in batches_of(self.source, pieces, counts):
                keys = np.empty((len(batch), per_text), dtype=_KEY)
                keys["row"] = np.arange(texts, texts + len(batch))[:, None]
                hashes = near_keys(batch.texts) if is_near else exact_keys(batch.texts)[:, None]
                keys["high"], keys["low"] = hashes[..., 0], hashes[..., 1]
                parts.append(keys.reshape(-1))
                texts, held = texts + len(batch), held + keys.size
                if held >= _RUN_KEYS:
                    flush()
            flush()
        return {"texts": texts, "runs": runs}


@dataclass(frozen=True)
class FindInBucket:
    """The function of the stage `duplicates`."""

    work: Folder
    groups: int
    buckets: int

    def __call__(self, number: int, _: int) -> Record:
        """Write the drops of a bucket: int64[groups + 1] where each group's begin, then text numbers, int64."""
        runs = np.frombuffer(self.work.read(_RUNS_FILE), dtype="<i8").reshape(-1, 3)
        parts = [self._slice(number, *run) for run in runs.tolist()]
        keys = np.concatenate(parts) if parts else np.empty(0, dtype=_KEY)
        group = np.repeat(runs[:, 0], [len(part) for part in parts])
        # Stable, and equal keys of a run are in the order of the texts: the first of equals is the earliest.
        order = np.lexsort((keys["low"], keys["high"]))
        keys, group = keys[order], group[order]
        is_repeated = np.zeros(len(keys), dtype=bool)
        is_repeated[1:] = (keys["high"][1:] == keys["high"][:-1]) & (keys["low"][1:] == keys["low"][:-1])
        rows, group = keys["row"][is_repeated], group[is_repeated]
        by_place = np.lexsort((rows, group))
        starts = np.searchsorted(group[by_place], np.arange(self.groups + 1))
        data = np.concatenate([starts, rows[by_place]]).astype("<i8")
        self.work.write(_drops_file(number), data.tobytes())
        return {"texts": 0}

    def _slice(self, number: int, group: int, offset: int, count: int) -> np.ndarray:
        """The keys of a run that belong to the bucket."""
        width = _PREFIXES // self.buckets
        with self.work.opened(_keys_file(group)) as read:
            head = np.frombuffer(read(offset + 8 * width * number, 8 * (width + 1)), dtype="<i8")
            start, stop = int(head[0]), int(head[-1])
            data = read(offset + _HEAD_BYTES + start * _KEY.itemsize, (stop - start) * _KEY.itemsize)
        return np.frombuffer(data, dtype=_KEY)


def exact_keys(texts: Iterable[str]) -> np.ndarray:
    """uint64[n, 2]: the 128-bit xxh3 of every text. Two of 10^12 different texts are equal once in 10^14 corpora."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
    return np.frombuffer(digests, dtype=">u8").reshape(-1, 2)


def _run(keys: np.ndarray) -> bytes:
    """Sorted by key, then by text, behind the starts of the prefixes."""
    ordered = keys[np.lexsort((keys["row"], keys["low"], keys["high"]))]
    prefixes = (ordered["high"] >> np.uint64(64 - _PREFIX_BITS)).astype(np.int64)
    head = np.searchsorted(prefixes, np.arange(_PREFIXES + 1)).astype("<i8")
    return head.tobytes() + ordered.tobytes()


def _keys_file(group: int) -> str:
    return f"fingerprints-{group:06d}.bin"


def _drops_file(bucket: int) -> str:
    return f"duplicates-{bucket:06d}.bin"
