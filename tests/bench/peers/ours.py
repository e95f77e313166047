"""Our stream as the engine uses it: read-ahead thread, then one padded micro-batch a step."""

from __future__ import annotations

from collections.abc import Iterator

from peers.contract import Epoch, Setting
from peers.padding import Padded

from vae_dist.config.schema import Config, TrainConfig
from vae_dist.data.stream.batch import micro_batches
from vae_dist.data.stream.training_data import open_training_data


def open_ours(setting: Setting) -> Epoch:
    """The data set in the order that the configuration's defaults give, one rank."""
    config = Config(train=TrainConfig(batch_sequences=setting.batch_sequences))
    data = open_training_data([str(setting.folder / "ours")], config)
    stream, steps = data.stream(0, 1), data.windows.steps_per_epoch

    def epoch(number: int) -> Iterator[Padded]:
        for share in stream.shares(number * steps, (number + 1) * steps):
            for batch in micro_batches(share, None):
                yield batch.tokens_BT, batch.lengths_B

    return epoch
