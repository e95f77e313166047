"""Text to a data set directory: read, split, tokenise, cut to length, write shards, then the manifest.

Two passes over the source, neither of which holds it: one for the vocabulary, one that encodes batch by batch.
The same source, options and order of files give byte-identical shards.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from vae_dist.config.load import canonical_json
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.batch import EOS_ID, UNK_ID
from vae_dist.data.dataset import Dataset, split_facts, write_manifest, write_tables
from vae_dist.data.shards import ShardWriter, payload_schema
from vae_dist.data.sources import Source, open_source
from vae_dist.data.tokenizer import Tokenizer, build_tokenizer
from vae_dist.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_ENCODE_TEXTS = 4096


def prepare(source_name: str, out_dir: Path, options: PrepareConfig, cache_dir: Path | None = None) -> Dataset:
    """Make the data set directory `out_dir`, or open it when it holds this very data set.

    Args:
        source_name: `docstrings`, a file, a directory, or a URL.
        cache_dir: where the docstring corpus is kept; default beside `out_dir`.

    Raises:
        DataError: the source is missing or not readable, holds no text, or `out_dir` holds something else.
    """
    source = open_source(source_name, options, cache_dir or out_dir.parent)
    origin = {"source": source.name, "fingerprint": source.fingerprint, "options": options.model_dump(mode="json")}
    if (out_dir / "manifest.json").exists():
        dataset = Dataset.open(out_dir)
        if dataset.manifest.get("origin") == json.loads(json.dumps(origin)):
            logger.info("%s is prepared already", out_dir)
            return dataset
        raise DataError(
            f"{out_dir} holds another data set (of {dataset.manifest.get('origin', {}).get('source')}, or made with "
            "other options). Choose another directory or delete this one."
        )
    if out_dir.exists() and any(p.suffix != ".tar" and not _is_ours(p) for p in out_dir.iterdir()):
        raise DataError(f"{out_dir} is not empty and holds no data set. Choose another directory.")
    # What an interrupted prepare left behind has no manifest and is of no use.
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    _write(source, out_dir, options, origin)
    dataset = Dataset.open(out_dir)
    for name in dataset.splits:
        logger.info("%s: %s", name, _facts_line(dataset.manifest["splits"][name]))
    return dataset


def prepare_cached(source_name: str, options: PrepareConfig, data_root: Path) -> tuple[Dataset, Path]:
    """Prepare under `data_root` in a directory named by source and options; returns it and where it is."""
    source = open_source(source_name, options, data_root)
    text = canonical_json({"source": source.fingerprint, "options": options.model_dump(mode="json")})
    label = Path(source.name.rstrip("/")).name.removesuffix(".gz")
    path = data_root / f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return prepare(source_name, path, options, data_root), path


def split_of(text: str, options: PrepareConfig) -> str:
    """The split a text belongs to by its hash: the same text is always in the same one."""
    share = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) / 2**64
    if share < options.test_fraction:
        return "test"
    return "valid" if share < options.test_fraction + options.valid_fraction else "train"


def fit_length(ids: np.ndarray, max_tokens: int, policy: str) -> list[np.ndarray]:
    """Apply the length policy to one encoded text; every piece ends with the end of sequence."""
    if len(ids) <= max_tokens:
        return [ids]
    if policy == "drop":
        return []
    body = ids[:-1]
    pieces = [body[i : i + max_tokens - 1] for i in range(0, len(body), max_tokens - 1)]
    kept = pieces[:1] if policy == "truncate" else pieces
    return [np.append(piece, EOS_ID) for piece in kept]


@dataclass
class _SplitWriter:
    """A split's shards and counts while they grow."""

    shards: ShardWriter
    docs: int = 0
    max_tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, ids: np.ndarray, options: PrepareConfig) -> None:
        if len(ids) > options.max_tokens:
            self.counts[f"too_long_{options.too_long}"] += 1
        for piece in fit_length(ids, options.max_tokens, options.too_long):
            self.shards.add(piece, self.docs)
            self.max_tokens = max(self.max_tokens, len(piece))
            self.counts["unknown_tokens"] += int((piece == UNK_ID).sum())
        self.docs += 1


def _write(source: Source, out_dir: Path, options: PrepareConfig, origin: dict[str, Any]) -> None:
    tokenizer = build_tokenizer((t for s, t in _split_texts(source, options) if s == "train"), options)
    schema = payload_schema(tokenizer.vocab_size, tokenizer.sha256)
    writers = {
        name: _SplitWriter(ShardWriter(out_dir, name, schema, options.shard_bytes, options.member_sequences))
        for name in SPLITS
    }
    for split, ids in _encoded(source, options, tokenizer):
        writers[split].add(ids, options)
    for writer in writers.values():
        writer.shards.close()
    kept = {name: w for name, w in writers.items() if w.shards.members}
    if "train" not in kept:
        raise DataError(
            f"The source {source.name} gives no training sequence: {sum(w.docs for w in writers.values())} texts were "
            "read. Check the files, prepare.max_tokens with prepare.too_long, and the split fractions."
        )
    tokenizer.save(out_dir / "tokenizer.json")
    write_tables(
        out_dir,
        {name: w.shards.members for name, w in kept.items()},
        {name: w.shards.shards for name, w in kept.items()},
    )
    facts, first_member = {}, 0
    for name, writer in kept.items():
        facts[name] = split_facts(writer.shards.members, first_member, writer.max_tokens, dict(writer.counts))
        first_member += len(writer.shards.members)
    write_manifest(
        out_dir,
        {
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "dtype": str(schema.field("tokens").type.value_type),
            "splits": facts,
            "origin": origin,
        },
    )


def _split_texts(source: Source, options: PrepareConfig) -> Iterator[tuple[str, str]]:
    """(split, text), duplicates left out when asked for. Remembers 8 bytes a text, not the text."""
    seen: set[int] = set()
    for split, text in source.texts():
        if options.deduplicate:
            digest = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
            if digest in seen:
                continue
            seen.add(digest)
        yield split or split_of(text, options), text


def _encoded(source: Source, options: PrepareConfig, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    texts = _split_texts(source, options)
    while batch := list(itertools.islice(texts, _ENCODE_TEXTS)):
        encoded = tokenizer.encode_batch([text for _, text in batch])
        yield from ((split, ids) for (split, _), ids in zip(batch, encoded, strict=True))


def _is_ours(path: Path) -> bool:
    return path.name in ("tokenizer.json", "index.arrow", "shards.arrow", "manifest.json.tmp", "tokenizer.json.tmp")


def _facts_line(facts: dict[str, int]) -> str:
    tokens = facts["tokens"]
    parts = [f"{facts['sequences']:,} sequences", f"{tokens:,} tokens"]
    parts.append(f"{100 * facts.get('unknown_tokens', 0) / tokens:.2f} % unknown")
    parts += [f"{count:,} {name.replace('_', ' ')}" for name, count in facts.items() if name.startswith("too_long")]
    return ", ".join(parts)
