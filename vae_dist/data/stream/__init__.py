"""From a data set directory to padded batches: the canonical order and each rank's share of it."""
