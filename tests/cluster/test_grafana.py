"""The Grafana dashboard: every query names a metric that the Prometheus endpoint of a node has while a run trains."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import httpx
import pytest
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from support import ROOT, TINY, RayCluster, records, start_command, wait_for

DASHBOARD = json.loads((ROOT / "cluster/grafana-training.json").read_text())
METRIC = re.compile(r"\bray_\w+")


def queries() -> list[str]:
    variables = [one["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    return variables + [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def samples(cluster: RayCluster) -> dict[str, list[str]]:
    """Lines of the endpoints that Prometheus would find, by the name of the metric."""
    found: dict[str, list[str]] = {}
    discovery = json.loads((cluster.folder / "prom_metrics_service_discovery.json").read_text())
    for target in (target for group in discovery for target in group["targets"]):
        # Ray's dashboard serves its own there, too; it may be busy.
        try:
            text = httpx.get(f"http://{target}/metrics", timeout=5).text
        except httpx.TransportError:
            continue
        for line in text.splitlines():
            if line and not line.startswith("#"):
                found.setdefault(re.split(r"[{ ]", line)[0], []).append(line)
    return found


@pytest.mark.long
@pytest.mark.timeout(420)
def test_every_query_names_a_metric_of_a_running_node(
    ray_cluster: RayCluster, dataset_dir: Path, tmp_path: Path
) -> None:
    wanted = {name for query in queries() for name in METRIC.findall(query)}
    assert len(wanted) > 15
    # Of machines that have some; the registry knows them everywhere.
    gpus = {name for name in wanted if name.startswith("ray_node_gpus_")}
    assert {name.removeprefix("ray_") for name in gpus} <= METRICS_GAUGES.keys()
    settings = [*TINY, f"run.storage={tmp_path}", "run.name=watched", f"data.dir={dataset_dir}", "train.steps=100000"]
    often = ["run.log_every_steps=5", "evaluate.every_steps=20", "run.checkpoint_every_steps=50", "cluster.workers=2"]
    often += ["run.peak_flops=1e12"]
    command = [sys.executable, "-m", "vae_dist.train", *settings, *often]
    process = start_command(command, ray_cluster.environment)
    seen: dict[str, list[str]] = {}

    def all_there() -> bool:
        assert process.poll() is None, process.communicate()
        for name, lines in samples(ray_cluster).items():
            # Of this run alone: the node may have seen others.
            of_ours = [line for line in lines if not name.startswith("ray_vae_dist_") or 'run="watched"' in line]
            seen.update({name: of_ours} if of_ours else {})
        return wanted - gpus <= seen.keys()

    try:
        wait_for(all_there, 240, lambda: f"{sorted(wanted - gpus - seen.keys())}")
    finally:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    # What Prometheus sees is what the run wrote.
    (line,) = seen["ray_vae_dist_valid_ppl"]
    written = records(tmp_path / "watched", "valid")
    assert any(abs(float(line.split()[-1]) / record["ppl"] - 1) < 1e-5 for record in written)


def test_panels_are_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})
    cells = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(cells)) == len(cells)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    for query in queries():
        if "ray_vae_dist_" in query and "label_values" not in query:
            assert all(f'{name}{{run=~"$run"}}' in query for name in METRIC.findall(query)), query
