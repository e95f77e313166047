"""A run's metrics for Prometheus, through the Ray node that the driver runs on."""

from __future__ import annotations

from functools import cache
from typing import Any

from ray.util.metrics import Gauge


def show_record(record: dict[str, Any], run: str) -> None:
    """Set `ray_vae_dist_<kind>_<name>{run=...}` to each number of a record of metrics.jsonl.

    Names and units are those of the file, so that a new metric needs nothing here.
    """
    for name, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and record["kind"] != "event":
            _gauge(f"vae_dist_{record['kind']}_{name}").set(value, tags={"run": run})


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(name, "See metrics.jsonl of the run.", tag_keys=("run",))
