"""A table as Markdown: published rows and ours, ours as median and range over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from vae_dist.table.definition import Definition, Peer, Row

# Key, heading, decimals.
_COLUMNS = (
    ("elbo_ppl", "-ELBO PPL", 2),
    ("iw_ppl", "IW PPL", 2),
    ("rec_per_seq", "Rec", 2),
    ("kl_per_seq", "KL", 2),
    ("mutual_information_nats", "MI", 2),
    ("active_units", "AU", 0),
)
_LEGEND = (
    "PPL per token, the end of a sequence counted; of a language model its own. IW: importance-weighted bound, "
    "{samples} samples. Rec, KL and MI in nats per sequence, AU active units. Ours: median, with the range where there "
    "are several seeds."
)
_STATUSES = (
    " [V] read in the repository named; [M*] second hand and unverified, but its NLL and PPL agree under this token "
    "count; [M] second hand and unverified."
)


def markdown(definition: Definition, results: Sequence[dict[str, Any]]) -> str:
    """The table; `results` are rows of the results file, and a method without any says so."""
    headings = ["Method", *(heading for _, heading, _ in _COLUMNS), "Status"]
    ours = [_our_cells(row, [r for r in results if r["method"] == row.method]) for row in definition.rows]
    lines = [headings, ["---", *("---:" for _ in _COLUMNS), "---"], *map(_peer_cells, definition.peers), *ours]
    legend = _LEGEND.format(samples=definition.evaluation.importance_samples) + _STATUSES * bool(definition.peers)
    return "\n".join([*(_line(cells) for cells in lines), "", legend])


def texts_markdown(title: str, texts: dict[str, Any]) -> str:
    """What a model wrote, all that was kept of it: samples, reconstructions, ways from one text to another."""
    parts = [f"### {title}", _list("Samples", texts["samples"])]
    if "reconstruction" in texts:
        pairs = [f"{one['input']} → {one['output']}" for one in texts["reconstruction"]["examples"]]
        parts.append(_list("Texts of the test split and what their posterior means decode to", pairs))
    for one in texts.get("interpolation", {}).get("examples", []):
        points = [f"{point['t']:.1f} {point['text']}" for point in one["points"]]
        parts.append(_list(f"From `{one['a']}` to `{one['b']}`", points))
    return "\n\n".join(parts)


def _list(title: str, items: Sequence[str]) -> str:
    # In code nothing is markup, `<unk>` included.
    return "\n".join([f"{title}:", "", *(f"    {item}" for item in items)])


def _peer_cells(peer: Peer) -> list[str]:
    # As many digits as were published.
    numbers = ["" if (value := getattr(peer, key)) is None else f"{value:g}" for key, _, _ in _COLUMNS]
    reason = f"; not comparable: {peer.not_comparable}" if peer.not_comparable else ""
    return [peer.method, *numbers, f"[{peer.status}] {peer.source}{reason}"]


def _our_cells(row: Row, results: list[dict[str, Any]]) -> list[str]:
    seeds = ", ".join(str(r["seed"]) for r in results)
    status = f"ours, seed{'s' if len(results) > 1 else ''} {seeds}" if results else "ours, no result yet"
    numbers = [_spread([r[key] for r in results if r[key] is not None], decimals) for key, _, decimals in _COLUMNS]
    return [row.method, *numbers, f"{status}; {row.note}" if row.note else status]


def _spread(values: list[float], decimals: int) -> str:
    if not values:
        return ""
    # The median of whole numbers may be a half.
    middle, least, most = (
        f"{value:.{decimals}f}" if decimals else f"{value:g}"
        for value in (statistics.median(values), min(values), max(values))
    )
    return middle if least == most else f"{middle} ({least} to {most})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
