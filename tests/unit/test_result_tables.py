"""Every shipped table resolves: its rows are configurations that load, and its results belong to it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support import ROOT

from vae_dist.table.jobs import load_table
from vae_dist.table.make import page
from vae_dist.table.results import Results

TABLES = sorted((ROOT / "configs/results").glob("*.table.yaml"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_a_shipped_table_resolves_and_its_results_are_its_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    table = load_table(path.relative_to(ROOT))
    results = Results(table)
    for job in table.jobs:
        row = results.find(job)
        if row is not None:
            assert results.changes(job, row) == [], job.label


@pytest.mark.parametrize("name", ["coco", "multi30k"])
def test_a_page_of_texts_is_that_of_the_results(name: str) -> None:
    table = load_table(ROOT / f"configs/results/{name}.table.yaml")
    results = Results(table)
    found = [(job, row) for job in table.jobs if (row := results.find(job))]
    _, _, rest = (ROOT / f"configs/results/{name}.md").read_text(encoding="utf-8").partition("\n\n")
    assert rest == page(table, found, results) + "\n"


def rows_of(table: str) -> list[dict]:
    """The results so far; none where no row is done."""
    path = ROOT / f"configs/results/{table}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


@pytest.mark.parametrize("table", [path.name.removesuffix(".table.yaml") for path in TABLES])
def test_results_agree_with_themselves(table: str) -> None:
    for row in rows_of(table):
        nll = row["rec_per_seq"] + (row["kl_per_seq"] or 0.0)
        assert row["elbo_ppl"] == pytest.approx(math.exp(nll * row["sequences"] / row["tokens"]), rel=1e-6)
        # The importance-weighted bound is the tighter one, and a language model has none.
        assert (row["iw_ppl"] is None) == (row["importance_samples"] == 0)
        assert row["iw_ppl"] is None or row["iw_ppl"] < row["elbo_ppl"]
        assert row["command"].startswith("python -m vae_dist.train ")


def test_the_ptb_rows_count_the_published_protocol() -> None:
    for row in rows_of("ptb"):
        assert (row["sequences"], row["tokens"], row["split"]) == (3761, 82430, "test")
        assert row["importance_samples"] in (0, 500)
