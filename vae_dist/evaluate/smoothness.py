"""How smoothly text changes along a line between two latents. Pure functions over token rows.

A path is the rows decoded at S + 1 points x_0, ..., x_S, equally spaced from one latent to another (greedily, so that
no noise moves the text); x_0 and x_S are what the ends themselves decode to. d is the edit distance: the fewest tokens
to insert, delete or replace (Levenshtein 1966), ends of sequence included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

Row = Sequence[int]
Path = Sequence[Row]


def edit_distance(a: Row, b: Row) -> int:
    """d(a, b)."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        now = [i]
        for j, y in enumerate(b, 1):
            now.append(min(before[j] + 1, now[j - 1] + 1, before[j - 1] + (x != y)))
        before = now
    return before[-1]


def neighbour_distance(path: Path) -> float:
    """Mean over the S steps of d(x_s, x_(s+1)) / max(length of either), in [0, 1]: the size of a step."""
    return float(np.mean([edit_distance(a, b) / max(len(a), len(b), 1) for a, b in pairwise(path)]))


def changed_fraction(path: Path) -> float:
    """Share of the S steps at which the text changes at all; small when it jumps between few texts."""
    return float(np.mean([list(a) != list(b) for a, b in pairwise(path)]))


def path_length_ratio(path: Path) -> float:
    """sum of d(x_s, x_(s+1)) over d(x_0, x_S): 1 for a path without detours, by the triangle inequality at least 1.

    NaN where both ends decode to the same text.
    """
    direct = edit_distance(path[0], path[-1])
    return sum(edit_distance(a, b) for a, b in pairwise(path)) / direct if direct else math.nan


def order_correlation(path: Path) -> float:
    """Mean of the rank correlations (Spearman) of s with d(x_0, x_s) and of S - s with d(x_S, x_s).

    1 when the text moves away from the one end and towards the other at every step; ties have their mean rank.
    NaN where a distance is the same at all points.
    """
    steps = np.arange(len(path))
    away = np.array([edit_distance(path[0], row) for row in path])
    left = np.array([edit_distance(path[-1], row) for row in path])
    return (_rank_correlation(steps, away) + _rank_correlation(steps[::-1], left)) / 2


def nll_bump(nll_per_token: Sequence[float]) -> float:
    """NLL per token (nats) of the midpoint's text given its z, less the mean of that of both ends.

    Positive when the decoder is less sure between the ends than at them: a hole in the latent space. The midpoint of
    an odd number of steps is the mean of the two points beside it.
    """
    last = len(nll_per_token) - 1
    middle = (nll_per_token[last // 2] + nll_per_token[(last + 1) // 2]) / 2
    return middle - (nll_per_token[0] + nll_per_token[-1]) / 2


_OF_PATH: dict[str, Callable[[Path], float]] = {
    "neighbour_distance": neighbour_distance,
    "changed_fraction": changed_fraction,
    "path_length_ratio": path_length_ratio,
    "order_correlation": order_correlation,
}


def smoothness(paths: Sequence[Path], nll_per_token: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The means over paths of the functions above, each over the paths where it is defined.

    Args:
        paths: at least one, all of the same number of points, at least 3.
        nll_per_token: for each point of each path, -log p(text | z) / tokens in nats.

    Returns:
        pairs (paths), steps (S), nll_bump in nats per token, the others as named; NaN where no path defines a value.
    """
    points = {len(path) for path in paths} | {len(nll) for nll in nll_per_token}
    if len(points) != 1 or min(points) < 3 or len(paths) != len(nll_per_token):
        raise ValueError(f"paths need the same number of points, at least 3, and an NLL for each; got {sorted(points)}")
    values = {name: [measure(path) for path in paths] for name, measure in _OF_PATH.items()}
    values["nll_bump"] = [nll_bump(nll) for nll in nll_per_token]
    means = {name: _mean_of_defined(found) for name, found in values.items()}
    return {"pairs": len(paths), "steps": min(points) - 1, **means}


def _mean_of_defined(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: the correlation of ranks; NaN where one of them is constant."""
    ranks = [np.unique(v, return_inverse=True, return_counts=True)[1:] for v in (x, y)]
    # The mean rank of the values that are equal: those below, and half of those beside.
    a, b = ((np.cumsum(count) - (count + 1) / 2)[rank] for rank, count in ranks)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else math.nan
