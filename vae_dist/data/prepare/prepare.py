"""Text to a data set directory, or opening the one that is there.

The same files and options give a byte-identical data set on every machine and with any number of workers. Paths and
times, by which a later call knows that nothing has changed, are kept apart from the manifest in origin.json. How it
is made: `making.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from vae_dist.config.credentials import without_credentials
from vae_dist.config.load import canonical_json
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.claim import claimed, is_tidy, open_work
from vae_dist.data.prepare.making import Making
from vae_dist.data.prepare.manifest import label, report
from vae_dist.data.prepare.tasks import Progress, Run, Silent, run_here
from vae_dist.data.prepare.work import Stages, cannot_write
from vae_dist.data.source.sources import Source, open_source
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.filesystem import resolve
from vae_dist.data.store.folder import Folder
from vae_dist.data.text.tokenizer import TRAINED_KINDS, Tokenizer
from vae_dist.errors import DataError

logger = logging.getLogger(__name__)

# Input bytes of a task: seconds of work, and what a killed prepare may have to do again for each worker. A small corpus
# is cut finer, so that all workers end at about the same time.
_LARGEST_GROUP, _SMALLEST_GROUP = 32 * 2**20, 8 * 2**20
_GROUPS = 64


def prepare(
    source_name: str,
    out_dir: str | Path,
    options: PrepareConfig,
    cache_dir: Path | None = None,
    *,
    run: Run = run_here,
    progress: Progress | None = None,
    group_bytes: int | None = None,
) -> Dataset:
    """Make the data set directory `out_dir`, or open it when it holds this very data set.

    A second call at the same time waits for the first (on local file systems; nothing keeps two writers apart in an
    object store). A call that is killed leaves no manifest, and the next one goes on with what it finished.

    Args:
        source_name: `docstrings`, a file, a directory, or a URL.
        out_dir: a directory, or the URL of one in an object store. Where `run` uses several machines, a directory
            must be one that all of them share.
        cache_dir: where the docstring corpus is kept; default beside `out_dir`.
        run: runs the tasks; see `vae_dist.launch.prepare`.
        group_bytes: input of a task, bytes as stored; default: 8 to 32 MiB, by the size of the source. The data set
            does not depend on it, but a killed prepare is gone on with only where it is the same.

    Raises:
        DataError: the source is missing or not readable, holds no text, or `out_dir` holds something else.
        MachineError: `out_dir` cannot be written.
    """
    source = open_source(source_name, options, cache_dir or _beside(out_dir))
    origin = _origin(source, options)
    out = Folder(*resolve(out_dir))
    if not is_tidy(out):
        with claimed(out) as is_mine:
            if is_mine:
                try:
                    size = group_bytes or _group_bytes(source)
                    stages = Stages(open_work(out, {"origin": origin, "group_bytes": size}), run, progress or Silent())
                    Making(stages, source, size).write(out, origin)
                except OSError as error:
                    raise cannot_write(out.path, error) from None
                return report(Dataset.open(out_dir))
    return _open_finished(out, out_dir, origin)


def prepare_cached(
    source_name: str,
    options: PrepareConfig,
    data_root: Path,
    *,
    run: Run = run_here,
    progress: Progress | None = None,
) -> tuple[Dataset, Path]:
    """Prepare under `data_root` in a directory named by source and options; returns it and where it is."""
    source = open_source(source_name, options, data_root)
    digest = hashlib.sha256(canonical_json(_origin(source, options)).encode()).hexdigest()[:12]
    path = data_root / f"{label(source).removesuffix('.gz')}-{digest}"
    return prepare(source_name, path, options, data_root, run=run, progress=progress), path


def train_tokenizer(
    source_name: str,
    options: PrepareConfig,
    cache_dir: Path,
    *,
    run: Run = run_here,
    progress: Progress | None = None,
    group_bytes: int | None = None,
) -> Tokenizer:
    """The tokenizer that `prepare` would train. Works in `cache_dir`, and leaves nothing there."""
    source = open_source(source_name, options, cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=cache_dir) as folder:
        work = open_work(Folder(*resolve(folder)), {})
        making = Making(Stages(work, run, progress or Silent()), source, group_bytes or _group_bytes(source))
        return making.tokenizer(making.drops())


def _origin(source: Source, options: PrepareConfig) -> dict[str, Any]:
    """What decides whether a data set must be made again."""
    is_file = options.tokenizer not in TRAINED_KINDS
    tokenizer = Tokenizer.load(Path(options.tokenizer)).sha256 if is_file else options.tokenizer
    return {
        "source": without_credentials(source.name),
        "fingerprint": source.fingerprint,
        "options": options.model_dump(mode="json") | {"tokenizer": tokenizer},
    }


def _group_bytes(source: Source) -> int:
    total = sum(file.bytes for file in source.files)
    return min(_LARGEST_GROUP, max(_SMALLEST_GROUP, total // _GROUPS))


def _beside(out_dir: str | Path) -> Path:
    return Path.cwd() if "://" in str(out_dir) else Path(out_dir).parent


def _open_finished(out: Folder, out_dir: str | Path, origin: dict[str, Any]) -> Dataset:
    try:
        found = out.read_json("origin.json")
    except (FileNotFoundError, ValueError):
        found = {}
    if found != json.loads(json.dumps(origin)):
        differing = [key for key in origin if found.get(key) != origin[key]]
        raise DataError(
            f"{out.path} holds another data set, made of {found.get('source', 'an unknown source')}: its "
            f"{' and '.join(differing)} differ. Choose another directory or delete this one."
        )
    logger.info("%s is prepared already", out.path)
    return Dataset.open(out_dir)
