"""Stage `shards`: the groups' sequences become tar shards, of which each can be written alone.

When all groups are encoded it is known how many sequences of a split every group has. Members hold exactly
`member_sequences` sequences and shards a fixed number of members, so the sequences of a shard follow from its number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from vae_dist.data.prepare.encode import Block, block_file, read_block, token_dtype
from vae_dist.data.prepare.texts import SPLITS
from vae_dist.data.prepare.work import Record, Stages
from vae_dist.data.store.folder import Folder
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.store.shards import MemberEntry, build_shard, entry_bytes, payload_schema
from vae_dist.data.text.tokenizer import Tokenizer

# An Arrow stream's messages around the arrays of a member, about.
_MEMBER_OVERHEAD_BYTES = 800


class BlockSlice(NamedTuple):
    """The sequences [begin, end) of a block, and the number in the split of its group's first text."""

    group: int
    block: Block
    begin: int
    end: int
    first_doc: int


class ShardPlan(NamedTuple):
    """What a shard is made of; `number` counts in its split."""

    split: str
    number: int
    first_member: int
    first_sequence: int
    sequences: int
    slices: list[BlockSlice]


@dataclass(frozen=True)
class Assemble:
    """The stage's function."""

    work: Folder
    out: Folder
    schema: pa.Schema
    vocab_size: int
    member_sequences: int

    def __call__(self, _: int, plan: ShardPlan) -> Record:
        """Write a shard.

        Returns:
            its row of the shard table, `entry`, and its rows of the index, `members`, column by column.
        """
        members = self._members(plan)
        shard = build_shard(plan.split, plan.number, plan.first_member, plan.first_sequence, members, self.schema)
        self.out.write(shard.entry.name, shard.data)
        columns = {f.name: [getattr(member, f.name) for member in shard.members] for f in fields(MemberEntry)}
        return {"texts": plan.sequences, "entry": asdict(shard.entry), "members": columns}

    def _members(self, plan: ShardPlan) -> Iterator[tuple[Sequences, np.ndarray]]:
        """Sequences and doc numbers, cut into members; holds little more than one."""
        held: list[tuple[Sequences, np.ndarray]] = []
        count = 0
        for part, docs in self._parts(plan.slices):
            start = 0
            while count + len(part) - start >= self.member_sequences:
                stop = start + self.member_sequences - count
                yield _joined([*held, (part.slice(start, stop), docs[start:stop])])
                held, count, start = [], 0, stop
            if start < len(part):
                held.append((part.slice(start, len(part)), docs[start:]))
                count += len(part) - start
        if held:
            yield _joined(held)

    def _parts(self, slices: Sequence[BlockSlice]) -> Iterator[tuple[Sequences, np.ndarray]]:
        dtype = token_dtype(self.vocab_size)
        for group, of_group in itertools.groupby(slices, key=lambda one: one.group):
            with self.work.opened(block_file(group)) as read:
                for one in of_group:
                    sequences, docs = read_block(read, one.block, dtype)
                    yield sequences.slice(one.begin, one.end), docs[one.begin : one.end] + one.first_doc


def assemble_shards(
    stages: Stages,
    out: Folder,
    tokenizer: Tokenizer,
    groups: Sequence[Record],
    member_sequences: int,
    shard_bytes: int,
) -> dict[str, list[Record]]:
    """Write the shards of all splits.

    Args:
        groups: the record of every group, whose work files are in the stages' folder.
        shard_bytes: about the size of a shard.

    Returns:
        the records of the shards of every split that has any; see `Assemble`.
    """
    schema = payload_schema(tokenizer.vocab_size, tokenizer.sha256)
    token_bytes = token_dtype(tokenizer.vocab_size).itemsize
    plans = []
    for split in SPLITS:
        of_groups = [group["splits"][split] for group in groups]
        plans += plan_shards(split, of_groups, member_sequences, shard_bytes, token_bytes)
    assemble = Assemble(stages.work, out, schema, tokenizer.vocab_size, member_sequences)
    records = stages.finish("shards", assemble, plans, [plan.sequences for plan in plans])
    found: dict[str, list[Record]] = {}
    for plan, record in zip(plans, records, strict=True):
        found.setdefault(plan.split, []).append(record)
    return found


def plan_shards(
    split: str, groups: Sequence[Record], member_sequences: int, shard_bytes: int, token_bytes: int
) -> list[ShardPlan]:
    """The shards of a split.

    Args:
        groups: the split's part of every group's record, see `Encode`.
        shard_bytes: about the size of a shard, of at least one member.
        token_bytes: bytes of a token.
    """
    pieces = list(_all_blocks(groups))
    total = sum(piece.end for piece in pieces)
    if not total:
        return []
    tokens = sum(piece.block.tokens for piece in pieces)
    in_member = min(member_sequences, total)
    # Eight bytes for the number of the text, four for the offset.
    member_bytes = entry_bytes(_MEMBER_OVERHEAD_BYTES + round(in_member * (12 + token_bytes * tokens / total)))
    members_in_shard = max(1, shard_bytes // member_bytes)
    step = members_in_shard * member_sequences
    return [
        ShardPlan(split, number, number * members_in_shard, first, min(step, total - first), slices)
        for number, (first, slices) in enumerate(zip(range(0, total, step), _cut(pieces, step), strict=True))
    ]


def _all_blocks(groups: Sequence[Record]) -> Iterator[BlockSlice]:
    first_doc = 0
    for number, group in enumerate(groups):
        for block in itertools.starmap(Block, group["blocks"]):
            yield BlockSlice(number, block, 0, block.sequences, first_doc)
        first_doc += group["texts"]


def _cut(blocks: Sequence[BlockSlice], step: int) -> Iterator[list[BlockSlice]]:
    """Runs of `step` sequences; the last may be shorter."""
    run: list[BlockSlice] = []
    room = step
    for whole in blocks:
        begin = 0
        while begin < whole.end:
            end = min(whole.end, begin + room)
            run.append(whole._replace(begin=begin, end=end))
            begin, room = end, room - (end - begin)
            if room == 0:
                yield run
                run, room = [], step
    if run:
        yield run


def _joined(parts: list[tuple[Sequences, np.ndarray]]) -> tuple[Sequences, np.ndarray]:
    return Sequences.concatenate([part for part, _ in parts]), np.concatenate([docs for _, docs in parts])


def index_columns(records: Sequence[Record]) -> dict[str, list[int]]:
    """A split's rows of the index, column by column, from the records of its shards."""
    return {f.name: [n for record in records for n in record["members"][f.name]] for f in fields(MemberEntry)}
