"""Ray Data on a cluster of this process alone: Parquet to padded batches by `iter_torch_batches`."""

from __future__ import annotations

import atexit
import itertools
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from peers.contract import SHUFFLE_SEQUENCES, Epoch, Setting
from peers.corpus import made_once
from peers.padding import Padded, pad_list_column
from ray.data.collate_fn import ArrowBatchCollateFn

_FILES = 16
_PREFETCH_BATCHES = 4
_OBJECT_STORE_BYTES = 2**30


class _Pad(ArrowBatchCollateFn):
    def __call__(self, batch: pa.Table) -> Padded:
        return pad_list_column(batch.column("tokens"))


def open_ray_data(setting: Setting) -> Epoch:
    """Files in shuffled order, rows through a local shuffle buffer."""
    folder = made_once(setting.folder / "ray_data", lambda path: _write(setting, path))
    _start_ray()
    paths = sorted(map(str, folder.glob("*.parquet")))

    def epoch(number: int) -> Iterator[Padded]:
        order = np.random.default_rng(number).permutation(paths).tolist()
        batches = ray.data.read_parquet(order).iter_torch_batches(
            batch_size=setting.batch_sequences,
            collate_fn=_Pad(),
            prefetch_batches=_PREFETCH_BATCHES,
            local_shuffle_buffer_size=SHUFFLE_SEQUENCES,
            local_shuffle_seed=number,
        )
        return iter(batches)

    return epoch


def _start_ray() -> None:
    # Unix socket paths must be short.
    temporary = tempfile.mkdtemp(prefix="bench-ray-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=temporary,
    )
    # Runs before the folder is removed: the last registered goes first.
    atexit.register(ray.shutdown)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # The newer reader takes two seconds to start an epoch, this one a sixth of a second.
    context.use_datasource_v2 = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _write(setting: Setting, folder: Path) -> None:
    tokens, offsets = setting.flat()
    bounds = np.linspace(0, len(offsets) - 1, _FILES + 1).astype(int)
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        mine = offsets[first : end + 1]
        values = pa.array(np.array(tokens[mine[0] : mine[-1]]))
        column = pa.ListArray.from_arrays(pa.array((mine - mine[0]).astype(np.int32)), values)
        pq.write_table(pa.table({"tokens": column}), folder / f"train-{number:03d}.parquet")
