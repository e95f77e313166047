"""Stage `collect`: the sequences of a finished data set go into a work file, each to the split it is to have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from vae_dist.data.prepare.encode import Block, BlockWriter, block_file, token_dtype
from vae_dist.data.prepare.texts import SPLITS
from vae_dist.data.prepare.work import Record
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.folder import Folder
from vae_dist.data.store.overlap import mixed
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.order import mix
from vae_dist.data.text.special_ids import UNK_ID

_BLOCK_TOKENS = 1 << 20
_DOCS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Choice:
    """Which training texts go to another split: decided by a hash of split name, text number and seed."""

    valid_fraction: float
    test_fraction: float
    seed: int

    def targets(self, docs: np.ndarray) -> np.ndarray:
        """int64 places in `SPLITS` of the training texts with these numbers."""
        key = mix(xxhash.xxh3_64_intdigest(b"train"), self.seed)
        drawn = (mixed(docs.astype(np.uint64) ^ np.uint64(key)) >> np.uint64(11)) * 2.0**-53
        bounds = np.cumsum([self.valid_fraction, self.test_fraction])
        return np.where(drawn < bounds[0], 1, np.where(drawn < bounds[1], 2, 0))


@dataclass(frozen=True)
class Collect:
    """The first stage's function: the sequences of a data set, each in the split it is to have."""

    work: Folder
    vocab_size: int
    choice: Choice | None

    def __call__(self, number: int, address: str) -> Record:
        """Write a data set's blocks.

        Returns:
            texts; and, for every split, texts, unknown_tokens, blocks and lengths: [length, sequences] pairs.
        """
        dataset = Dataset.open(address)
        with self.work.writing(block_file(number)) as stream:
            sink = BlockWriter(stream, token_dtype(self.vocab_size))
            writers = {name: _Writer(sink) for name in SPLITS}
            # What is moved stands behind what is there, so the training split comes last.
            for name in sorted(dataset.splits, key=lambda name: name == "train"):
                texts = dataset.manifest["splits"][name].get("texts", 0)
                if name == "train" and self.choice is not None:
                    self._divide(dataset, texts, writers)
                    continue
                for sequences, docs in dataset.split(name).members():
                    writers[name].add(sequences, docs)
                writers[name].texts = max(texts, writers[name].texts)
            splits = {name: writer.record() for name, writer in writers.items()}
        return {"texts": sum(one["texts"] for one in splits.values()), "splits": splits}

    def _divide(self, dataset: Dataset, texts: int, writers: dict[str, _Writer]) -> None:
        assert self.choice is not None
        numbers = _Renumber(self.choice, [writers[name].texts for name in SPLITS])
        for sequences, docs in dataset.split("train").members():
            targets, numbered = numbers.of(docs)
            for code, name in enumerate(SPLITS):
                rows = np.flatnonzero(targets == code)
                if len(rows):
                    writers[name].add(sequences.take(rows), numbered[rows])
        for name, count in zip(SPLITS, numbers.finish(texts), strict=True):
            writers[name].texts = count


class _Renumber:
    """New numbers for training texts, in order and without gaps in each split; texts that gave no sequence count."""

    def __init__(self, choice: Choice, first: Sequence[int]) -> None:
        """
        Args:
            first: next free number of each of `SPLITS`.
        """
        self._choice, self._next, self._doc = choice, np.array(first, dtype=np.int64), 0

    def of(self, docs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in `SPLITS` and new numbers of the next texts; old numbers do not decrease."""
        self._advance(int(docs[0]))
        targets = self._choice.targets(np.arange(self._doc, int(docs[-1]) + 1))
        numbers = np.empty(len(targets), dtype=np.int64)
        for code in range(len(SPLITS)):
            is_here = targets == code
            numbers[is_here] = self._next[code] + np.arange(np.count_nonzero(is_here))
        rows = docs - self._doc
        # The last text may go on in the next member.
        self._advance(int(docs[-1]))
        return targets[rows], numbers[rows]

    def finish(self, texts: int) -> list[int]:
        """How many texts each split has when all have been numbered."""
        self._advance(max(texts, self._doc + 1))
        return self._next.tolist()

    def _advance(self, doc: int) -> None:
        while self._doc < doc:
            end = min(doc, self._doc + _DOCS_AT_ONCE)
            self._next += np.bincount(self._choice.targets(np.arange(self._doc, end)), minlength=len(SPLITS))
            self._doc = end


class _Writer:
    """A split's blocks and counts in one group while they grow."""

    def __init__(self, sink: BlockWriter) -> None:
        self.texts = self._unknown_tokens = self._held_tokens = 0
        self._sink = sink
        self._lengths: Counter[int] = Counter()
        self._blocks: list[Block] = []
        self._held: list[tuple[Sequences, np.ndarray]] = []

    def add(self, sequences: Sequences, docs: np.ndarray) -> None:
        lengths, counts = np.unique(sequences.lengths, return_counts=True)
        self._lengths.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        self._unknown_tokens += int(np.count_nonzero(sequences.tokens == UNK_ID))
        self._held.append((sequences, docs))
        self._held_tokens += len(sequences.tokens)
        self.texts = max(self.texts, int(docs[-1]) + 1)
        if self._held_tokens >= _BLOCK_TOKENS:
            self._flush()

    def record(self) -> Record:
        """See `Collect`; writes what is held."""
        self._flush()
        facts = {"texts": self.texts, "unknown_tokens": self._unknown_tokens}
        return {**facts, "lengths": sorted(self._lengths.items()), "blocks": self._blocks}

    def _flush(self) -> None:
        if self._held:
            sequences, docs = zip(*self._held, strict=True)
            self._blocks.append(self._sink.append(np.concatenate(docs), Sequences.concatenate(sequences)))
        self._held, self._held_tokens = [], 0
