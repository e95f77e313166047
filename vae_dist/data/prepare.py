"""Text to a data set directory: read, lower-case, drop duplicates, split, tokenise, cut, write shards, manifest.

Two passes over the source, neither of which holds it: one for the vocabulary, one that encodes batch by batch.
The same files and options give a byte-identical data set on every machine: paths and times, by which a later call
knows that nothing has changed, are kept apart from the manifest in origin.json.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from vae_dist.config.load import canonical_json
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.claim import claimed, is_finished
from vae_dist.data.dataset import Dataset
from vae_dist.data.lengths import fit_length, length_facts
from vae_dist.data.shards import ShardWriter, payload_schema
from vae_dist.data.sources import Source, open_source
from vae_dist.data.tables import write_json, write_manifest, write_tables
from vae_dist.data.tokenizer import TRAINED_KINDS, Tokenizer, build_tokenizer, lowercase
from vae_dist.errors import DataError, MachineError

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_BATCH_TEXTS, _BATCH_CHARACTERS = 4096, 1 << 22


def prepare(source_name: str, out_dir: Path, options: PrepareConfig, cache_dir: Path | None = None) -> Dataset:
    """Make the data set directory `out_dir`, or open it when it holds this very data set.

    A second call at the same time waits for the first. A call that is killed leaves no manifest and is
    repeated from the start.

    Args:
        source_name: `docstrings`, a file, a directory, or a URL.
        cache_dir: where the docstring corpus is kept; default beside `out_dir`.

    Raises:
        DataError: the source is missing or not readable, holds no text, or `out_dir` holds something else.
    """
    source = open_source(source_name, options, cache_dir or out_dir.parent)
    origin = _origin(source, options)
    if not is_finished(out_dir):
        with claimed(out_dir) as is_mine:
            if is_mine:
                try:
                    _write(source, out_dir, options, origin)
                except OSError as error:
                    raise MachineError(f"{out_dir} cannot be written: {error}. Make room or choose another.") from None
                return _report(Dataset.open(out_dir))
    return _open_finished(out_dir, origin)


def prepare_cached(source_name: str, options: PrepareConfig, data_root: Path) -> tuple[Dataset, Path]:
    """Prepare under `data_root` in a directory named by source and options; returns it and where it is."""
    source = open_source(source_name, options, data_root)
    digest = hashlib.sha256(canonical_json(_origin(source, options)).encode()).hexdigest()[:12]
    path = data_root / f"{_label(source).removesuffix('.gz')}-{digest}"
    return prepare(source_name, path, options, data_root), path


def training_texts(source: Source, options: PrepareConfig) -> Iterator[str]:
    """The training split's texts as `prepare` sees them, for training a tokenizer."""
    return (text for split, text in _texts(source, options, Counter()) if split == "train")


def split_of(text: str, options: PrepareConfig) -> str:
    """The split a text belongs to by its hash: the same text is always in the same one."""
    share = xxhash.xxh3_64_intdigest(text.encode()) / 2**64
    if share < options.test_fraction:
        return "test"
    return "valid" if share < options.test_fraction + options.valid_fraction else "train"


def _origin(source: Source, options: PrepareConfig) -> dict[str, Any]:
    """What decides whether a data set must be made again."""
    is_file = options.tokenizer not in TRAINED_KINDS
    tokenizer = Tokenizer.load(Path(options.tokenizer)).sha256 if is_file else options.tokenizer
    return {
        "source": source.name,
        "fingerprint": source.fingerprint,
        "options": options.model_dump(mode="json") | {"tokenizer": tokenizer},
    }


def _label(source: Source) -> str:
    return Path(source.name.rstrip("/")).name


def _open_finished(out_dir: Path, origin: dict[str, Any]) -> Dataset:
    try:
        found = json.loads((out_dir / "origin.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        found = {}
    if found != origin:
        differing = [key for key in origin if found.get(key) != origin[key]]
        raise DataError(
            f"{out_dir} holds another data set, made of {found.get('source', 'an unknown source')}: its "
            f"{' and '.join(differing)} differ. Choose another directory or delete this one."
        )
    logger.info("%s is prepared already", out_dir)
    return Dataset.open(out_dir)


@dataclass
class _SplitWriter:
    """A split's shards and counts while they grow."""

    shards: ShardWriter
    options: PrepareConfig
    texts: int = 0
    unknown_tokens: int = 0
    too_long: int = 0
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, ids: np.ndarray, unk_id: int) -> None:
        """Append one encoded text."""
        self.too_long += len(ids) > self.options.max_tokens
        for piece in fit_length(ids, self.options.max_tokens, self.options.too_long):
            self.shards.add(piece, self.texts)
            self.lengths[len(piece)] += 1
            self.unknown_tokens += int((piece == unk_id).sum())
        self.texts += 1

    def facts(self, first_member: int) -> dict[str, Any]:
        """The split's entry in the manifest."""
        policy = self.options.too_long
        return {
            **length_facts(self.lengths),
            "texts": self.texts,
            "unknown_tokens": self.unknown_tokens,
            "truncated": self.too_long if policy == "truncate" else 0,
            "dropped": self.too_long if policy == "drop" else 0,
            "split": self.too_long if policy == "split" else 0,
            "shards": len(self.shards.shards),
            "first_member": first_member,
            "members": len(self.shards.members),
        }


def _write(source: Source, out_dir: Path, options: PrepareConfig, origin: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(training_texts(source, options), options)
    counts: Counter[str] = Counter()
    writers = _write_shards(source, out_dir, options, tokenizer, counts)
    kept = {name: writer for name, writer in writers.items() if writer.lengths}
    if "train" not in kept:
        texts, too_long = (sum(getattr(w, key) for w in writers.values()) for key in ("texts", "too_long"))
        raise DataError(
            f"The source {source.name} gives no training sequence: {texts} texts were read, {too_long} of them longer "
            "than prepare.max_tokens. Check the files, the split fractions, prepare.max_tokens and prepare.too_long."
        )
    tokenizer.save(out_dir / "tokenizer.json")
    write_tables(
        out_dir,
        {name: writer.shards.members for name, writer in kept.items()},
        {name: writer.shards.shards for name, writer in kept.items()},
    )
    write_json(out_dir / "origin.json", origin)
    write_manifest(out_dir, _manifest(source, options, tokenizer, kept, counts))


def _write_shards(
    source: Source, out_dir: Path, options: PrepareConfig, tokenizer: Tokenizer, counts: Counter[str]
) -> dict[str, _SplitWriter]:
    schema = payload_schema(tokenizer.vocab_size, tokenizer.sha256)
    sizes = options.shard_bytes, options.member_sequences
    writers = {name: _SplitWriter(ShardWriter(out_dir, name, schema, *sizes), options) for name in SPLITS}
    for batch in _batches(_texts(source, options, counts)):
        encoded = tokenizer.encode_batch([text for _, text in batch])
        for (split, _), ids in zip(batch, encoded, strict=True):
            writers[split].add(ids, tokenizer.unk_id)
    for writer in writers.values():
        writer.shards.close()
    return writers


def _manifest(
    source: Source, options: PrepareConfig, tokenizer: Tokenizer, kept: dict[str, _SplitWriter], counts: Counter[str]
) -> dict[str, Any]:
    members = [len(writer.shards.members) for writer in kept.values()]
    first_members = itertools.accumulate(members, initial=0)
    schema = payload_schema(tokenizer.vocab_size, tokenizer.sha256)
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": str(schema.field("tokens").type.value_type),
        "splits": {
            name: writer.facts(first) for (name, writer), first in zip(kept.items(), first_members, strict=False)
        },
        "empty_texts": counts["empty_texts"],
        "duplicate_texts": counts["duplicate_texts"],
        # Names and sizes only: paths and times differ between machines that hold the same data.
        "source": {"name": _label(source), "files": [[Path(f.path).name, f.bytes] for f in source.files]},
        "options": options.model_dump(mode="json") | {"tokenizer": Path(options.tokenizer).name},
    }


def _texts(source: Source, options: PrepareConfig, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """(split, text), lower-cased and without duplicates where asked for. Remembers a hash of a text, not the text."""
    seen: set[int] = set()
    for split, original in source.texts(counts):
        text = lowercase(original) if options.lowercase else original
        if options.deduplicate:
            digest = xxhash.xxh3_64_intdigest(text.encode())
            if digest in seen:
                counts["duplicate_texts"] += 1
                continue
            seen.add(digest)
        yield split or split_of(text, options), text


def _batches(texts: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    characters = 0
    for split, text in texts:
        batch.append((split, text))
        characters += len(text)
        if len(batch) == _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _report(dataset: Dataset) -> Dataset:
    for name, facts in dataset.manifest["splits"].items():
        parts = [f"{facts['sequences']:,} sequences", f"{facts['tokens']:,} tokens"]
        parts.append(f"{100 * facts['unknown_tokens'] / facts['tokens']:.2f} % unknown")
        parts += [f"{facts[key]:,} {key}" for key in ("truncated", "dropped", "split") if facts[key]]
        logger.info("%s: %s", name, ", ".join(parts))
    return dataset
