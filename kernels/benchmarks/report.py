"""From what was measured to one JSON object and a table."""

from __future__ import annotations

import math
from typing import Any

from contender import Contender
from loss_benchmark import Task
from problem import Shape

_BASE = "eager_fp32"


def loss_entry(device: str, shape: Shape, name: str, task: Task) -> dict[str, Any]:
    """One task at one shape.

    ratio_eager_fp32 and ratio_best_peer are the peer's milliseconds over those of our fastest; extra_memory_ratio is
    the extra memory of our fastest over that of eager_fp32. None where one of the two was not measured.
    """
    times = task.milliseconds[""]
    ours = _fastest(times, [entrant.contender for entrant in task.entrants.values()], is_ours=True)
    peer = _fastest(times, [entrant.contender for entrant in task.entrants.values()], is_ours=False)
    entry: dict[str, Any] = {
        "device": device,
        **shape._asdict(),
        "task": name,
        "milliseconds": times,
        "best_ours": ours,
        "ratio_eager_fp32": ratio(times, _BASE, ours),
        "best_peer": peer,
        "ratio_best_peer": ratio(times, peer, ours),
        "extra_memory_bytes": task.extra_bytes,
        "extra_memory_ratio": ratio(task.extra_bytes, ours, _BASE),
        "error_vs_fp64": {key: _rounded(entrant.errors) for key, entrant in task.entrants.items()},
        "could_not_run": task.could_not_run,
    }
    if "hot" in task.milliseconds:
        entry["milliseconds_hot"] = task.milliseconds["hot"]
    if task.memory_not_measured:
        entry["memory_not_measured"] = task.memory_not_measured
    return entry


def ratio(values: dict[str, Any], above: str | None, below: str | None) -> float | None:
    """values[above] / values[below] to four digits; None where either is missing or the divisor is zero."""
    if above is None or below is None or above not in values or not values.get(below):
        return None
    return _digits(values[above] / values[below])


def table(result: dict[str, Any]) -> str:
    """All that was measured, as plain text."""
    machine = result["machine"]
    lines = [", ".join(f"{key} {value}" for key, value in machine.items() if value is not None), ""]
    for entry in result["linear_cross_entropy"]:
        lines += [*_loss_lines(entry), ""]
    for name in ("gaussian_rsample_kl", "training_step"):
        for entry in result[name]:
            lines += [f"{name}: {_pairs(entry['settings'])}", *_plain_lines(entry), ""]
    return "\n".join(lines)


def _loss_lines(entry: dict[str, Any]) -> list[str]:
    kinds = [key for key in ("milliseconds", "milliseconds_hot") if key in entry]
    heads = ["ms", "ms hot"][: len(kinds)]
    heads += ["extra MiB", "nll", "dx", "dw", "confident: nll", "dx", "dw"]
    rows = [[f"linear_cross_entropy, {entry['task']}, N{entry['N']} H{entry['H']} V{entry['V']}", *heads]]
    for name in entry["milliseconds"]:
        extra = entry["extra_memory_bytes"].get(name)
        by_data = entry["error_vs_fp64"][name]
        shown = [by_data[data].get(key) for data in ("normal", "confident") for key in ("nll", "dx", "dw")]
        rows.append(
            [
                name,
                *(f"{entry[kind][name]:.3f}" for kind in kinds),
                "" if extra is None else f"{extra / 2**20:.1f}",
                *("" if error is None else f"{float(error):.1e}" for error in shown),
            ]
        )
    lines = [*_aligned(rows), f"  {_summary(entry)}"]
    return lines + [f"  could not run: {name}: {reason}" for name, reason in entry["could_not_run"].items()]


def _summary(entry: dict[str, Any]) -> str:
    """The ratios that are known, in words."""
    parts = [
        (f"{{}} times as fast as {_BASE}", entry["ratio_eager_fp32"]),
        (f"{{}} times as fast as {entry['best_peer']}, the fastest peer", entry["ratio_best_peer"]),
        (f"{{}} of the extra memory of {_BASE}", entry["extra_memory_ratio"]),
    ]
    known = [text.format(value) for text, value in parts if value is not None]
    return f"{entry['best_ours']}: {', '.join(known) or 'nothing to compare it with'}"


def _plain_lines(entry: dict[str, Any]) -> list[str]:
    lines = []
    for key, value in entry.items():
        if key != "settings":
            lines.append(f"  {key}: {_pairs(value) if isinstance(value, dict) else value}")
    return lines


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _fastest(times: dict[str, float], known: list[Contender], *, is_ours: bool) -> str | None:
    names = [contender.name for contender in known if contender.is_ours == is_ours and contender.name in times]
    return min(names, key=times.__getitem__, default=None)


def _rounded(errors: dict[str, dict[str, float]]) -> dict[str, dict[str, float | str]]:
    """Three digits; JSON has no word for what is not a number, so that becomes text."""
    return {
        data: {key: _digits(value, 3) if math.isfinite(value) else str(value) for key, value in found.items()}
        for data, found in errors.items()
    }


def _digits(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")
