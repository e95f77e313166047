"""What a run trains on: one data set or a mixture, and the order in which its sequences come."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from vae_dist.config.schema import Config
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.range_cache import RangeCache
from vae_dist.data.store.split import Damage, Split
from vae_dist.data.stream.order import OrderSpec
from vae_dist.data.stream.stream import Stream
from vae_dist.data.stream.windows import EpochWindows, MixtureWindows, Windows
from vae_dist.errors import DataError

# The shuffle's sizes where the configuration leaves them open.
_FEWEST_BLOCKS, _BLOCKS, _BLOCK_TOKENS = 16, 256, 2**16
_WINDOW_TOKENS = 2**22
_SMALLEST_SHARE = 1e-9
_LENGTH_GROUPS, _LENGTH_WINDOW_TOKENS = 1024, 2**24


@dataclass(frozen=True)
class TrainingData:
    """The opened training splits and their common order.

    Attributes:
        manifest_hash: names the data: of the data set, or of all of a mixture's.
    """

    datasets: tuple[Dataset, ...]
    splits: tuple[Split, ...]
    windows: Windows
    manifest_hash: str

    @property
    def max_tokens(self) -> int:
        """Of the longest sequence."""
        return max(split.max_tokens for split in self.splits)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens of a global batch."""
        batch = self.windows.specs[0].batch_sequences
        if isinstance(self.windows, MixtureWindows):
            means = (split.tokens / split.sequences for split in self.splits)
            return batch * sum(share * mean for share, mean in zip(self.windows.shares, means, strict=True))
        return self.splits[0].tokens / self.windows.steps_per_epoch

    def stream(self, rank: int, world_size: int) -> Stream:
        """One rank's share of every batch."""
        return Stream(self.splits, self.windows, rank, world_size)

    def mixture_report(self, steps: int) -> dict[str, float] | None:
        """Share of the sequences of each data set in the first `steps` steps; None without a mixture."""
        if not isinstance(self.windows, MixtureWindows):
            return None
        counts = self.windows.sequences_by_component(steps)
        return {data.path: count / sum(counts) for data, count in zip(self.datasets, counts, strict=True)}


def open_training_data(dirs: Sequence[str], config: Config, *, workers: int | None = None) -> TrainingData:
    """Open the data set directories of a run: the only one, or those of `data.mixture` in its order.

    Args:
        workers: how many workers of a run do this; None in a process that plans one. A worker uses `data.cache_dir`,
            which is a directory of its host, takes the driver's look at all shards for done, and has its share of the
            damage budget.

    Raises:
        DataError: a directory cannot be opened, lacks a training split, or they do not go together.
    """
    datasets = tuple(Dataset.open(path, check_shards=workers is None) for path in dirs)
    for other in datasets[1:]:
        if other.tokenizer.sha256 != datasets[0].tokenizer.sha256:
            raise DataError(
                f"{other.path} and {datasets[0].path} were prepared with different tokenizers, so they cannot be "
                f"mixed. Prepare the first with `--tokenizer {datasets[0].path}/tokenizer.json`."
            )
    data = config.data
    cache = RangeCache(data.cache_dir, data.cache_bytes) if data.cache_dir and workers is not None else None
    splits = tuple(training_split(each, config, cache=cache, workers=workers or 1) for each in datasets)
    specs = [order_spec(config, split, each.manifest_hash) for split, each in zip(splits, datasets, strict=True)]
    if data.mixture is None:
        return TrainingData(datasets, splits, EpochWindows(specs[0]), datasets[0].manifest_hash)
    # The windows of a mixture are those of its first data set.
    specs = [dataclasses.replace(spec, length_groups=specs[0].length_groups) for spec in specs]
    _check_mixture(datasets, specs, list(data.mixture.values()))
    together = hashlib.sha256("".join(each.manifest_hash for each in datasets).encode()).hexdigest()
    return TrainingData(datasets, splits, MixtureWindows(specs, list(data.mixture.values())), together)


def order_spec(config: Config, split: Split, manifest_hash: str) -> OrderSpec:
    """The order of a split that the configuration asks for, its open sizes chosen by the split's own.

    Left open, a block is one member; less where a stream would have fewer than 16 blocks, several members (up to
    65,536 tokens, so that a request to an object store is worth its round trip) where it still has 256. A window is
    about four million tokens.
    """
    data = config.data
    mean = split.tokens / split.sequences
    block = data.shuffle_block_sequences or _block_sequences(split, data.streams, mean)
    return OrderSpec(
        sequences=split.sequences,
        manifest_hash=manifest_hash,
        seed=config.train.seed,
        streams=data.streams,
        batch_sequences=config.train.batch_sequences,
        length_groups=data.length_groups or _length_groups(config, mean),
        block_sequences=block,
        window_sequences=data.shuffle_window_sequences or max(1, round(_WINDOW_TOKENS / mean)),
    )


def _block_sequences(split: Split, streams: int, mean_tokens: float) -> int:
    block = split.member_sequences
    while block > 1 and split.sequences < _FEWEST_BLOCKS * streams * block:
        block = -(-block // 2)
    while 2 * block * mean_tokens <= _BLOCK_TOKENS and split.sequences >= 2 * _BLOCKS * streams * block:
        block *= 2
    return block


def _length_groups(config: Config, mean_tokens: float) -> int:
    tokens_per_group = config.train.batch_sequences / config.data.streams * mean_tokens
    return max(1, min(_LENGTH_GROUPS, round(_LENGTH_WINDOW_TOKENS / tokens_per_group)))


def training_split(dataset: Dataset, config: Config, *, cache: RangeCache | None = None, workers: int = 1) -> Split:
    """The training split under the configuration's damage policy."""
    if config.data.damage == "fail":
        return dataset.split("train", cache=cache)
    sequences = dataset.manifest["splits"].get("train", {}).get("sequences", 0)
    budget = int(config.data.damage_budget_fraction * sequences / workers)
    return dataset.split("train", damage=Damage(budget), cache=cache)


def _check_mixture(datasets: Sequence[Dataset], specs: Sequence[OrderSpec], weights: Sequence[float]) -> None:
    streams = specs[0].streams
    for number, (dataset, spec, weight) in enumerate(zip(datasets, specs, weights, strict=True)):
        if weight < max(weights) * _SMALLEST_SHARE:
            raise DataError(
                f"data.mixture gives {dataset.path} a weight of {weight:g} beside one of {max(weights):g}: less than "
                "one sequence in a billion. Raise it or leave the data set out."
            )
        if dataset.manifest_hash in (other.manifest_hash for other in datasets[:number]):
            raise DataError(
                f"data.mixture names the data set {dataset.path} twice, perhaps by a copy. Give it once, with the sum "
                "of the weights."
            )
        if spec.sequences < streams:
            raise DataError(
                f"{dataset.path} has {spec.sequences} training sequences, too few for data.streams = {streams} in a "
                "mixture. Lower data.streams or leave the data set out."
            )
    window = specs[0].length_groups * specs[0].group_sequences
    if window < len(datasets) ** 2:
        raise DataError(
            f"A mixture of {len(datasets)} data sets needs windows of at least {len(datasets) ** 2} sequences, but "
            f"data.length_groups * train.batch_sequences / data.streams = {window}. Raise data.length_groups."
        )
