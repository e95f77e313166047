"""What a service measures of itself, for Prometheus.

A replica counts in its own process; whichever is asked for /metrics asks all of them and labels their numbers, because
a request reaches one replica and not the next time the same. Ray's own metrics of Serve are on its nodes, as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from vae_dist.serve.models import Models

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Measures:
    """Of one replica."""

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfModels(models))
        self._requests = Counter(
            "vae_dist_requests", "Requests that were answered.", ["endpoint", "status"], registry=self._registry
        )
        self._seconds = self._histogram("vae_dist_request_seconds", "From a request's arrival to its last byte.")
        self._first = self._histogram(
            "vae_dist_first_token_seconds", "From a request's arrival to the first event of its stream."
        )

    def request(self, endpoint: str, status: int, seconds: float, first_s: float | None) -> None:
        """One was answered, or its client left (499)."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)
        if first_s is not None:
            self._first.labels(endpoint).observe(first_s)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, ["endpoint"], buckets=_SECONDS, registry=self._registry)

    def families(self) -> list[Metric]:
        """All numbers at this moment."""
        return list(self._registry.collect())


class _OfModels(Collector):
    """Read where the models are, when they are asked for."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        active = GaugeMetricFamily("vae_dist_slots_active", "Rows that are being decoded.", labels=["model"])
        waiting = GaugeMetricFamily("vae_dist_rows_waiting", "Rows that wait for a slot.", labels=["model"])
        slots = GaugeMetricFamily("vae_dist_slots", "Rows that can be decoded at a time.", labels=["model"])
        tokens = CounterMetricFamily("vae_dist_tokens", "Tokens that were written.", labels=["model"])
        pace = GaugeMetricFamily("vae_dist_tokens_per_second", "Over the last ten seconds.", labels=["model"])
        for model in self._models.all():
            label = [model.name]
            for family, value in zip((active, waiting, slots), model.thread.load, strict=True):
                family.add_metric(label, value)
            tokens.add_metric(label, model.thread.pace.tokens)
            pace.add_metric(label, model.thread.pace.per_second())
        reloads = CounterMetricFamily("vae_dist_reloads", "New exports in a directory.", labels=["model", "outcome"])
        for labels, count in list(self._models.reloads.items()):
            reloads.add_metric(labels, count)
        return iter((active, waiting, slots, tokens, pace, reloads))


def exposition(replicas: Sequence[tuple[str, Iterable[Metric]]]) -> bytes:
    """The text that Prometheus reads: families of all replicas, each number with the name of its replica."""
    merged: dict[str, Metric] = {}
    for replica, families in replicas:
        for family in families:
            into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    return generate_latest(_Merged(list(merged.values())))


class _Merged(CollectorRegistry):
    def __init__(self, families: list[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)
