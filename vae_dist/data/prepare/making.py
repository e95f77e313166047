"""The stages of a prepare, one after the other.

    fingerprints, duplicates   only with `deduplicate`            deduplicate.py
    sample                     only where a tokenizer is trained  sampling.py
    encode                     texts to token sequences           encode.py
    shards                     sequences to tar shards            assemble.py

A stage is a list of tasks that an executor runs, here or on many machines. Every task streams what it reads. What the
tasks are depends on the source and the options, not on the executor, so neither do the bytes that are written.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from vae_dist.data.prepare.assemble import assemble_shards, index_columns
from vae_dist.data.prepare.claim import clear
from vae_dist.data.prepare.deduplicate import Drops, find_duplicates
from vae_dist.data.prepare.encode import TOKENIZER_FILE, Encode
from vae_dist.data.prepare.manifest import make_manifest, no_training_sequence
from vae_dist.data.prepare.sampling import sample_training_texts
from vae_dist.data.prepare.tables import write_manifest, write_tables
from vae_dist.data.prepare.work import Stages
from vae_dist.data.source.sources import Source
from vae_dist.data.store.folder import Folder
from vae_dist.data.text.tokenizer import TRAINED_KINDS, Tokenizer, build_tokenizer

logger = logging.getLogger(__name__)


class Making:
    """Makes a data set, or a tokenizer, of a source."""

    def __init__(self, stages: Stages, source: Source, group_bytes: int) -> None:
        """
        Args:
            stages: with a work folder that `open_work` opened.
            group_bytes: input of a task, bytes.
        """
        self._stages, self._work, self._source, self._options = stages, stages.work, source, source.options
        self._groups = source.pieces(group_bytes)
        self._sizes = [sum(piece.bytes for piece in group) for group in self._groups]

    def write(self, out: Folder, origin: dict[str, Any]) -> None:
        """Write the data set; the manifest comes last.

        Raises:
            DataError: the source is not readable or gives no training sequence.
        """
        drops = self.drops()
        tokenizer = self.tokenizer(drops)
        encoded = self._stages.finish("encode", Encode(self._source, self._work, drops), self._groups, self._sizes)
        if not any(record["splits"]["train"]["blocks"] for record in encoded):
            raise no_training_sequence(self._source, encoded)
        sizes = self._options.member_sequences, self._options.shard_bytes
        shards = assemble_shards(self._stages, out, tokenizer, encoded, *sizes)
        # What an interrupted writer of other shards left.
        clear(out, keep={record["entry"]["name"] for records in shards.values() for record in records})
        out.write(TOKENIZER_FILE, self._work.read(TOKENIZER_FILE))
        out.write_json("origin.json", origin, indent=1)
        hashes = write_tables(
            out,
            {name: index_columns(records) for name, records in shards.items()},
            {name: [record["entry"] for record in records] for name, records in shards.items()},
        )
        write_manifest(out, make_manifest(self._source, tokenizer, encoded, shards) | hashes)

    def drops(self) -> Drops | None:
        """The duplicates, where they are to be left out."""
        if self._options.deduplicate == "none":
            return None
        return find_duplicates(self._stages, self._source, self._groups, self._sizes)

    def tokenizer(self, drops: Drops | None) -> Tokenizer:
        """The tokenizer, trained once, or loaded where the options name a file; kept in the work folder."""
        if not self._work.has(TOKENIZER_FILE):
            texts: list[str] = []
            if self._options.tokenizer in TRAINED_KINDS:
                texts = sample_training_texts(self._stages, self._source, self._groups, self._sizes, drops)
                logger.info("training a tokenizer on %s texts", f"{len(texts):,}")
            self._work.write(TOKENIZER_FILE, _file_bytes(build_tokenizer(texts, self._options)))
        return Tokenizer(self._work.read(TOKENIZER_FILE))


def _file_bytes(tokenizer: Tokenizer) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / TOKENIZER_FILE)
        return (Path(folder) / TOKENIZER_FILE).read_bytes()
