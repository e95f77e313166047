"""What the ledgers of a run say: which sequences each step was made with."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.split import read_all

Row = tuple[int, str]


def steps_of(run: Path) -> dict[int, frozenset[Row]]:
    """Step -> (position, hash) of its sequences, over all ranks.

    A step that was made again must have been made with the same sequences, by the same rank where there were as many
    workers.
    """
    by_rank: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for path in sorted((run / "ledger").iterdir()):
        rank, _, world = path.stem.partition("-of-")
        # The last line may be cut off where a process was killed.
        for line in path.read_text().split("\n")[:-1]:
            one = json.loads(line)
            rows = list(zip(one["position"], one["xxh3_64"], strict=True))
            before = by_rank.setdefault((world, one["step"]), {}).setdefault(rank, rows)
            assert before == rows, f"step {one['step']} was made again with other sequences"
    found: dict[int, frozenset[Row]] = {}
    for (_, step), ranks in by_rank.items():
        rows = frozenset(row for rows in ranks.values() for row in rows)
        assert len(rows) == sum(map(len, ranks.values())), f"step {step} took a sequence twice"
        # A rank that was killed between a step and its line leaves a part of it.
        fewer, more = sorted((rows, found.get(step, rows)), key=len)
        assert fewer <= more, f"step {step} was made again with other sequences"
        found[step] = more
    return found


def require_exact(run: Path, dataset_dir: Path, steps: int) -> int:
    """Every step is there, and an epoch holds every sequence of the training split once; returns the whole epochs."""
    found = steps_of(run)
    assert sorted(found) == list(range(steps))
    positions = [position for rows in found.values() for position, _ in rows]
    assert len(set(positions)) == len(positions), "a sequence was taken twice in an epoch"
    tokens, offsets = read_all(Dataset.open(dataset_dir).split("train"), 10**9)
    everything = Counter(
        xxhash.xxh3_64_hexdigest(np.asarray(tokens[a:b], "<i8").tobytes()) for a, b in pairwise(offsets)
    )
    size, per_step = everything.total(), max(len(rows) for rows in found.values())
    steps_per_epoch = -(-size // per_step)
    for epoch in range(steps // steps_per_epoch):
        its_steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
        assert sum((Counter(d for _, d in found[s]) for s in its_steps), Counter()) == everything, f"epoch {epoch}"
    return steps // steps_per_epoch


def times_made(run: Path) -> Counter[int]:
    """Step -> how often it was made, by rank 0."""
    lines = [line for path in run.glob("ledger/rank-00000-*") for line in path.read_text().split("\n")[:-1]]
    return Counter(json.loads(line)["step"] for line in lines)
