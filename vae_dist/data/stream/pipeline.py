"""The stream as a `webdataset.DataPipeline`, for training loops that are built of its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import webdataset

from vae_dist.data.stream.batch import Batch, micro_batches
from vae_dist.data.stream.stream import Stream


def batch_pipeline(
    stream: Stream,
    first_step: int,
    end_step: int,
    *stages: Callable[..., Iterator[object]],
    micro_batch_tokens: int | None = None,
) -> webdataset.DataPipeline:
    """Padded batches of this rank for the steps [first_step, end_step), followed by stages of webdataset.

    Resume by giving the next step as `first_step`. What the stages do to the order or number of batches is not known
    to the stream.

    Args:
        stages: such as `webdataset.map(function)`.
        micro_batch_tokens: see `batch.micro_batches`.
    """

    def source() -> Iterator[Batch]:
        for share in stream.shares(first_step, end_step):
            yield from micro_batches(share, micro_batch_tokens)

    return webdataset.DataPipeline(source, *stages)
