"""Metrics, sinks, throughput and the report: what a person sees of a run."""
