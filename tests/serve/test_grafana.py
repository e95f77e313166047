"""The endpoint's Grafana dashboard: every query names a metric that the service has."""

from __future__ import annotations

import json
import re

import httpx
from support import ROOT

DASHBOARD = json.loads((ROOT / "cluster/grafana-endpoint.json").read_text())
# What Prometheus makes of a family of each type.
SERIES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}


def test_every_query_names_a_metric_and_its_labels(client: httpx.Client) -> None:
    client.post("/v1/sample", json={"seed": 0, "stream": True})
    text = client.get("/metrics").text
    known = {
        name + suffix
        for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE)
        for suffix in SERIES.get(kind, ())
    }
    labels = set(re.findall(r'[{,](\w+)="', text)) | {"job", "outcome"}
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    expressions += [one["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    assert len(expressions) > 10
    for expression in expressions:
        names = re.findall(r"\bvae_dist_\w+", expression)
        assert names and set(names) <= known, expression
        used = re.findall(r"(\w+)=~?\"", expression) + re.findall(
            r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression))
        )
        assert set(used) <= labels, expression


def test_panels_lie_beside_each_other() -> None:
    panels = DASHBOARD["panels"]
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
    assert len(places) == len({p["id"] for p in panels}) == len({p["title"] for p in panels}) == len(panels)
