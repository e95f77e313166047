"""One tar member: whether its bytes are an Arrow record batch of our kind, and its tokens sequences of our kind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from vae_dist.data.store.sequences import Sequences
from vae_dist.data.store.shards import TAR_BLOCK, MemberEntry
from vae_dist.data.text.special_ids import BOS_ID, EOS_ID, PAD_ID

RESTORE_SHARD = "Restore the shard from a copy, or prepare the data again."
PREPARE_AGAIN = "Prepare the data again with this data set's tokenizer."

Tell = Callable[[str, str], None]
"""Takes what is wrong with the member, and the fix."""


def member_content(data: pa.Buffer, schema: pa.Schema | None, problem: Tell) -> tuple[Sequences, np.ndarray] | None:
    """Tokens and doc numbers from the bytes of a member's entry, or None and a problem told.

    Args:
        schema: what it must have; None where nobody knows.
    """
    try:
        with pa.ipc.open_stream(data.slice(TAR_BLOCK)) as stream:
            found, batches = stream.schema, list(stream)
        for batch in batches:
            batch.validate(full=True)
    # pyarrow raises its own errors, those of the operating system, and those of Python.
    except Exception as error:
        problem(f"it is no Arrow record batch: {type(error).__name__}: {error}", RESTORE_SHARD)
        return None
    wanted = schema if schema is not None else found
    if not found.equals(wanted, check_metadata=True) or found.names != ["tokens", "doc"]:
        problem(_schema_fault(found, wanted), PREPARE_AGAIN)
        return None
    if len(batches) != 1 or any(column.null_count for column in (*batches[0].columns, batches[0].column(0).values)):
        problem(f"it holds {len(batches)} record batches where one is meant, or gaps in it", RESTORE_SHARD)
        return None
    column = batches[0].column(0)
    offsets = column.offsets.to_numpy().astype(np.int64)
    tokens = column.values.to_numpy()[offsets[0] : offsets[-1]]
    return Sequences(tokens, offsets - offsets[0]), batches[0].column(1).to_numpy()


def check_content(
    sequences: Sequences,
    docs: np.ndarray,
    first: int,
    entry: MemberEntry | None,
    vocab_size: int | None,
    problem: Tell,
) -> None:
    """Tell what is wrong with a member's tokens and doc numbers.

    Args:
        first: number of its first sequence in the split.
        entry: its row of the index; None where that is lost.
    """
    if entry is not None and (len(sequences), len(sequences.tokens)) != (entry.sequences, entry.tokens):
        held = f"{len(sequences)} sequences and {len(sequences.tokens)} tokens"
        problem(f"it holds {held}; the index says {entry.sequences} and {entry.tokens}", RESTORE_SHARD)
    for what in token_faults(sequences, vocab_size, first):
        problem(what, PREPARE_AGAIN)
    if len(docs) and (docs[0] < 0 or (np.diff(docs) < 0).any()):
        problem("its doc numbers decrease, or are negative", PREPARE_AGAIN)


def token_faults(sequences: Sequences, vocab_size: int | None, first: int) -> list[str]:
    """Every rule for tokens that some sequence breaks, with the number of the first that does.

    Args:
        first: number of the first sequence in the split.
    """
    tokens, ends = sequences.tokens, sequences.offsets[1:] - 1
    is_end = np.zeros(len(tokens), dtype=bool)
    is_end[ends[sequences.lengths > 0]] = True
    is_wrong = {
        f"ids outside the vocabulary of {vocab_size}": tokens >= (2**32 if vocab_size is None else vocab_size),
        f"an end of sequence ({EOS_ID}) before the end": (tokens == EOS_ID) & ~is_end,
        f"padding ({PAD_ID}) or a beginning of sequence ({BOS_ID})": (tokens == PAD_ID) | (tokens == BOS_ID),
        "a last token that is no end of sequence": (tokens != EOS_ID) & is_end,
    }
    found = []
    if not sequences.lengths.all():
        empty = np.flatnonzero(sequences.lengths == 0)
        found.append(f"{len(empty)} of its sequences have no token, the first is {first + empty[0]}")
    for what, wrong in is_wrong.items():
        if wrong.any():
            rows = np.unique(np.searchsorted(sequences.offsets, np.flatnonzero(wrong), side="right") - 1)
            token = int(tokens[int(np.argmax(wrong))])
            found.append(f"{len(rows)} of its sequences have {what}, the first is {first + rows[0]} (token {token})")
    return found


def _schema_fault(found: pa.Schema, wanted: pa.Schema) -> str:
    def metadata(schema: pa.Schema) -> str:
        held = {k.decode(errors="replace"): v.decode(errors="replace") for k, v in (schema.metadata or {}).items()}
        return f"tokenizer {held.get('tokenizer_sha256', 'none')[:12]}, format {held.get('format_version', 'none')}"

    def columns(schema: pa.Schema) -> str:
        return ", ".join(f"{field.name} {field.type}" for field in schema)

    if found.equals(wanted):
        return f"it was written with another tokenizer or format: {metadata(found)}, not {metadata(wanted)}"
    return f"its Arrow schema is ({columns(found)}), not ({columns(wanted)})"
