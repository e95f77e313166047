"""The page of an evaluation: one self-contained HTML file with every number, and beside it what the number is.

It renders a dict, the JSON that `vae-dist eval` prints, and computes only drawing coordinates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from vae_dist.observe import charts
from vae_dist.observe.definitions import (
    BASELINES,
    LIKELIHOOD,
    RECONSTRUCTION,
    SAMPLE_QUALITY,
    SMOOTHNESS,
    Definition,
)
from vae_dist.observe.page import check_keys, format_decimal, format_percent, format_whole, render_page, write_page
from vae_dist.observe.report import kl_chart

_NATS = "nats per sequence"

REQUIRED = frozenset({"title", "scores"})
OPTIONAL = frozenset(
    {
        "model",
        "data",
        "split",
        "seed",
        "finished_at",
        "active_unit_threshold",
        "variance_of_posterior_mean_per_dim",
        "ngram_baselines",
        "reconstruction",
        "samples",
        "sample_quality",
        "interpolation",
    }
)


def render_evaluation(evaluation: dict[str, Any]) -> str:
    """The page as HTML text.

    Args:
        evaluation: `REQUIRED` keys and any of `OPTIONAL`; a section whose key is missing is left out.
            scores: of `evaluate.likelihood.summarise`, and importance_samples; numbers that have no definition in
                `observe/definitions.py` are shown by their key.
            ngram_baselines, reconstruction, samples, sample_quality, interpolation: of `evaluate.texts`.

    Raises:
        ValueError: a required key is missing, or a key is not known.
    """
    check_keys(evaluation, REQUIRED, OPTIONAL)
    scores = dict(evaluation["scores"])
    if not scores.get("importance_samples"):
        scores.pop("importance_samples", None)
    if latents := scores.get("mutual_information_latents"):
        scores["mutual_information_ceiling_nats"] = math.log(latents)
    given = dict.fromkeys(OPTIONAL) | evaluation
    return render_page(
        "evaluation.html.jinja",
        **given,
        headline=_headline(scores),
        likelihood=_rows(scores, LIKELIHOOD | _undefined(scores, LIKELIHOOD)),
        comparison=_comparison(scores, given["ngram_baselines"]),
        kl_per_dim_chart=kl_chart({**given, "kl_per_dim": scores["kl_per_dim"]}) if scores.get("kl_per_dim") else None,
        baselines=_table(given["ngram_baselines"], BASELINES),
        reconstruction_rows=_rows(given["reconstruction"] or {}, RECONSTRUCTION),
        quality=_table(given["sample_quality"], SAMPLE_QUALITY),
        smoothness=_rows(given["interpolation"] or {}, SMOOTHNESS),
    )


def write_evaluation(evaluation: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Render and write the page, whole or not at all."""
    write_page(render_evaluation(evaluation), path)


def _headline(scores: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and unit of what is read first; the importance-weighted perplexity where there is one."""
    bound = "iw_ppl" if "iw_ppl" in scores else "ppl"
    samples = format_whole(scores.get("importance_samples"))
    how = f"importance weighted, K = {samples}" if bound == "iw_ppl" else "upper bound"
    dimensions = f" / {len(scores['kl_per_dim'])}" if scores.get("kl_per_dim") else ""
    ceiling = format_decimal(scores.get("mutual_information_ceiling_nats"))
    found = (
        (bound, "Perplexity", 1, "", f"per token, {how}"),
        (f"{bound}_per_word", "Perplexity", 1, "", f"per word, {how}"),
        ("elbo_per_seq", "ELBO", 2, "", _NATS),
        ("rec_per_seq", "Reconstruction", 2, "", _NATS),
        ("kl_per_seq", "KL", 2, "", _NATS),
        ("mutual_information_nats", "Mutual information", 2, "", f"nats, of at most {ceiling}"),
        ("active_units", "Active units", 0, dimensions, "latent dimensions"),
    )
    return [
        (name, format_decimal(scores[key], digits) + tail, unit)
        for key, name, digits, tail, unit in found
        if key in scores
    ]


def _rows(values: Mapping[str, Any], definitions: Mapping[str, Definition]) -> list[tuple[Definition, str]]:
    """Definition and written value of each key that is there."""
    return [(known, _written(values[key], known)) for key, known in definitions.items() if key in values]


def _undefined(values: Mapping[str, Any], definitions: Mapping[str, Definition]) -> dict[str, Definition]:
    """Stand-ins for the numbers that no definition is known of, so that they are shown all the same."""
    return {
        key: Definition(key, "fine", "", "")
        for key, value in values.items()
        if key not in definitions and isinstance(value, int | float)
    }


def _table(section: Mapping[str, Any] | None, definitions: Mapping[str, Definition]) -> dict[str, Any] | None:
    """The rows of a section turned into columns: their names, and for each definition its values in them."""
    if section is None:
        return None
    columns = section["rows"]
    shown = {key: known for key, known in definitions.items() if any(key in column for column in columns)}
    lines = [
        (known, [_written(column[key], known) if key in column else "" for column in columns])
        for key, known in shown.items()
    ]
    return {"names": [column["name"] for column in columns], "lines": lines}


def _written(value: Any, known: Definition) -> str:
    if known.form == "text":
        return str(value)
    if known.form == "whole":
        return format_whole(value)
    if known.form == "percent":
        return format_percent(value)
    return format_decimal(value, 3 if known.form == "fine" else 2)


def _comparison(scores: Mapping[str, Any], baselines: Mapping[str, Any] | None) -> Markup | None:
    """Perplexities per token of the n-gram models and of this one, or None if there are not two to compare."""
    rows = [(row["name"], row["ppl_per_token"], "other") for row in (baselines or {}).get("rows", ())]
    for name, key in (("This model, ELBO", "ppl"), ("This model, IW", "iw_ppl")):
        if key in scores:
            rows.append((name, scores[key], "own"))
    return charts.comparison_chart("Perplexity per token", rows) if len(rows) > 1 else None
