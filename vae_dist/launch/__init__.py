"""Ray drivers. With `serve`, the only place that imports ray."""
