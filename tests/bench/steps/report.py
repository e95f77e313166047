"""The results as a table, and held against results of another day."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MARGIN = 0.15
"""A ratio may be this share below the committed one: runs on a busy and a quiet machine differed by a tenth."""


def table(results: list[dict[str, Any]]) -> str:
    """For people: a block for each model and batch."""
    return "\n".join(line for result in results for line in _block(result))


def _block(result: dict[str, Any]) -> list[str]:
    ours = result["tokens_per_second"]["ours"]
    lines = [f"\n{result['model']}, {result['batch_sequences']} sequences a batch, ours in {result['precision']}"]
    lines.append(f"  {'contender':<20}{'tokens/s':>10}{'ours/it':>9}{'peak MiB':>10}")
    for name, speed in result["tokens_per_second"].items():
        memory = result["peak_memory_mib"].get(name)
        lines.append(
            f"  {name:<20}{speed:>10,.0f}{ours / speed:>9.2f}{'-' if memory is None else f'{memory:,.0f}':>10}"
        )
    whole = sum(result["split_ms"].values())
    parts = ", ".join(f"{part} {ms / whole:.1%}" for part, ms in result["split_ms"].items())
    lines.append(f"  a step of ours, {whole:,.0f} ms: {parts}")
    lines.append(
        f"  matrix products {result['matmul_fraction']:.0%} of the step, at {result['matmul_rate_fraction']:.0%} of "
        f"torch.mm's rate at their shapes; engine, data and logging {result['overhead_fraction']:.1%}"
    )
    return lines


def check(result: dict[str, Any], committed: Path) -> int:
    """Whether every ratio is at least the committed one less `MARGIN`; says which are not. The process's status."""
    before = {_key(entry): entry for entry in json.loads(committed.read_text(encoding="utf-8"))["results"]}
    worse, compared = [], 0
    for entry in result["results"]:
        for name in entry:
            expected = before.get(_key(entry), {}).get(name)
            if not name.startswith("ratio_") or expected is None:
                continue
            compared += 1
            if entry[name] < (1.0 - MARGIN) * expected:
                worse.append(f"{_key(entry)} {name} is {entry[name]:.2f} and was {expected:.2f}")
    if not compared:
        worse.append(f"{committed} holds none of these models and batches")
    for line in worse:
        print(f"error: {line}", file=sys.stderr)
    return 1 if worse else 0


def _key(entry: dict[str, Any]) -> str:
    return f"{entry['model']}/{entry['batch_sequences']}"
