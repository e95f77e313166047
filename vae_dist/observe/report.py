"""The report of a run: one self-contained HTML page. It renders a dict and computes only drawing coordinates.

The page needs no network and no script (a script of a few lines only reads curve values under the pointer).
All texts are escaped, so samples may hold any characters.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from vae_dist.observe import charts
from vae_dist.observe.page import check_keys, render_page, write_page

REQUIRED = frozenset({"title", "headline", "curves"})
OPTIONAL = frozenset(
    {
        "run_dir",
        "finished_at",
        "kl_per_dim",
        "active_unit_threshold",
        "variance_of_posterior_mean_per_dim",
        "latent_use",
        "samples",
        "reconstructions",
        "interpolation",
        "throughput",
        "wall_time",
        "counts",
        "config_yaml",
        "versions",
        "next_commands",
    }
)

_NATS = "nats per sequence"
# Key in the records of `curves`, title, unit, options of the chart.
_MAIN_CURVES: tuple[tuple[str, str, str, dict[str, bool]], ...] = (
    ("elbo_per_seq", "ELBO", _NATS, {"focus": True}),
    ("rec_per_seq", "Reconstruction", _NATS, {"focus": True}),
    ("kl_per_seq", "KL to the prior", _NATS, {"from_zero": True}),
    ("active_units", "Active units", "dimensions", {"from_zero": True}),
    ("mutual_information_nats", "Mutual information of text and latent", "nats", {"from_zero": True}),
    ("ppl", "Perplexity", "per token", {"focus": True}),
)
_SIDE_CURVES: tuple[tuple[str, str, str, dict[str, bool]], ...] = (
    ("beta", "Weight of the KL", "beta", {"from_zero": True}),
    ("learning_rate", "Learning rate", "step size of the optimizer", {"from_zero": True}),
    ("grad_norm", "Gradient norm", "L2 norm", {"from_zero": True}),
    ("tokens_per_second", "Speed", "tokens per second", {"from_zero": True}),
)


def render_report(report: dict[str, Any]) -> str:
    """The page as HTML text.

    Args:
        report: `REQUIRED` keys and any of `OPTIONAL`; a section whose key is missing is left out.

    Raises:
        ValueError: a required key is missing, or a key is not known.
    """
    check_keys(report, REQUIRED, OPTIONAL)
    return render_page(
        "report.html.jinja",
        **dict.fromkeys(OPTIONAL) | report,
        main_curves=_curves(report["curves"], _MAIN_CURVES, width=400),
        side_curves=_curves(report["curves"], _SIDE_CURVES, width=260),
        comparison=_comparison(report["headline"]),
        kl_chart=kl_chart(report) if report.get("kl_per_dim") else None,
    )


def write_report(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Render and write the page, whole or not at all."""
    write_page(render_report(report), path)


def _curves(
    curves: dict[str, list[dict[str, Any]]],
    wanted: Sequence[tuple[str, str, str, dict[str, bool]]],
    width: int,
) -> list[Markup]:
    """One chart for each key that a record has."""
    drawn = []
    for key, title, unit, options in wanted:
        series = [
            charts.Series(name, style, points, dots=style == "valid")
            for style, name in (("train", "training"), ("valid", "validation"))
            if (points := [(r["step"], r[key]) for r in curves.get(style, ()) if key in r])
        ]
        if series:
            drawn.append(charts.line_chart(title, unit, series, width=width, height=round(0.55 * width), **options))
    return drawn


def _comparison(headline: dict[str, Any]) -> Markup | None:
    """Perplexities of the n-gram models and of this one, or None if there are not two to compare."""
    baselines, valid = headline.get("baselines", {}), headline.get("valid", {})
    rows = [
        (name, values[key], style)
        for name, values, key, style in (
            ("Unigram", baselines, "unigram_ppl", "other"),
            ("Kneser-Ney bigram", baselines, "bigram_ppl", "other"),
            ("This model, at most", valid, "ppl", "own"),
        )
        if key in values
    ]
    return charts.comparison_chart("Perplexity on validation", rows) if len(rows) > 1 else None


def kl_chart(report: dict[str, Any]) -> Markup:
    """KL of each latent dimension; grey where the posterior mean varies less than the threshold."""
    variance = report.get("variance_of_posterior_mean_per_dim")
    threshold = report.get("active_unit_threshold")
    bars = []
    for i, kl in enumerate(report["kl_per_dim"]):
        tooltip, style = f"dimension {i}: KL {kl:.4g} nats", "own"
        if variance and threshold is not None:
            style = "own" if variance[i] >= threshold else "dead"
            tooltip += f", variance of posterior mean {variance[i]:.4g}, {'active' if style == 'own' else 'dead'}"
        bars.append(charts.Bar(kl, tooltip, style))
    return charts.bar_chart("KL of each latent dimension", _NATS, "latent dimension", bars)
