"""New data sets from finished ones: several merged into one, or training texts moved to validation and test.

The sequences go through the same two stages as in a prepare: into a work file, where it shows how many there are of
each split, and from there into members and shards of constant size (`assemble.py`). The same input gives the same
bytes, and a call that was killed goes on with what it finished.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.assemble import assemble_shards, index_columns
from vae_dist.data.prepare.claim import claimed, clear, is_finished, open_work
from vae_dist.data.prepare.collect import Choice, Collect
from vae_dist.data.prepare.encode import TOKENIZER_FILE
from vae_dist.data.prepare.lengths import length_facts
from vae_dist.data.prepare.manifest import report
from vae_dist.data.prepare.tables import write_manifest, write_tables
from vae_dist.data.prepare.tasks import Silent, run_here
from vae_dist.data.prepare.texts import SPLITS
from vae_dist.data.prepare.work import Record, Stages, cannot_write
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.store.filesystem import resolve
from vae_dist.data.store.folder import Folder
from vae_dist.data.store.shards import token_type
from vae_dist.errors import ConfigError, DataError

_COUNTS = ("empty_texts", "filtered_texts", "duplicate_texts")
_LENGTH_COUNTS = ("truncated", "dropped", "split")


def merge(dirs: Sequence[str | Path], out_dir: str | Path) -> Dataset:
    """One data set of several: splits of the same name one after another, the numbers of texts continued.

    Members and shards get the sizes of the first data set's options.

    Raises:
        DataError: the tokenizers differ, an input is damaged, or `out_dir` is not empty.
        MachineError: `out_dir` cannot be written.
    """
    datasets = [Dataset.open(path) for path in dirs]
    for other in datasets[1:]:
        if other.tokenizer.sha256 != datasets[0].tokenizer.sha256:
            raise DataError(
                f"{datasets[0].path} and {other.path} were prepared with different tokenizers, so they cannot be "
                f"merged. Prepare the second with `--tokenizer {datasets[0].path}/tokenizer.json`."
            )
    return _rewrite(dirs, datasets, out_dir, None)


def split(path: str | Path, out_dir: str | Path, valid_fraction: float, test_fraction: float, seed: int = 0) -> Dataset:
    """Move shares of the training texts to the validation and test splits, behind what these hold already.

    All sequences of a text stay together. What the counts `truncated`, `dropped` and `split` say of the training
    split stays there: which texts they were is not known.

    Args:
        valid_fraction, test_fraction: shares of the training texts.
        seed: of the choice, which is the same for ever.

    Raises:
        ConfigError: the fractions are negative, both 0, or leave nothing to train on.
        DataError: no training sequence is left, the input is damaged, or `out_dir` is not empty.
        MachineError: `out_dir` cannot be written.
    """
    if min(valid_fraction, test_fraction) < 0 or not 0 < valid_fraction + test_fraction < 1:
        raise ConfigError(
            f"The fractions {valid_fraction:g} and {test_fraction:g} must not be negative, and their sum must lie "
            "between 0 and 1. Give --valid-fraction, --test-fraction or both."
        )
    return _rewrite([path], [Dataset.open(path)], out_dir, Choice(valid_fraction, test_fraction, seed))


def _rewrite(
    addresses: Sequence[str | Path], datasets: Sequence[Dataset], out_dir: str | Path, choice: Choice | None
) -> Dataset:
    out = Folder(*resolve(out_dir))
    if not out.is_local:
        raise DataError(f"{out_dir} is no local directory. Write the data set to a local one, then copy it.")
    for dataset in datasets:
        if strange := set(dataset.splits) - set(SPLITS):
            raise DataError(
                f"{dataset.path} has the split {min(strange)!r}; only {', '.join(SPLITS)} can be rewritten."
            )
    is_mine = False
    if not is_finished(out):
        with claimed(out) as is_mine:
            if is_mine:
                try:
                    _write(addresses, datasets, out, choice)
                except OSError as error:
                    raise cannot_write(out.path, error) from None
    if not is_mine:
        raise DataError(f"{out_dir} holds a data set already. Choose a new directory.")
    return report(Dataset.open(out_dir))


def _write(addresses: Sequence[str | Path], datasets: Sequence[Dataset], out: Folder, choice: Choice | None) -> None:
    """The stages, one after the other; the manifest comes last."""
    first, tokenizer = datasets[0], datasets[0].tokenizer
    rewritten = {"of": [dataset.manifest_hash for dataset in datasets], "split": choice and asdict(choice)}
    stages = Stages(open_work(out, {"rewritten": rewritten}), run_here, Silent())
    sizes = [sum(dataset.split(name).sequences for name in dataset.splits) for dataset in datasets]
    collect = Collect(stages.work, tokenizer.vocab_size, choice)
    groups = stages.finish("collect", collect, [str(address) for address in addresses], sizes)
    options = PrepareConfig().model_dump(mode="json") | first.manifest.get("options", {})
    of_splits = {name: [group["splits"][name] for group in groups] for name in SPLITS}
    if not any(group["blocks"] for group in of_splits["train"]):
        raise DataError(f"No training sequence of {first.path} is left. Lower the fractions, or take another seed.")
    shards = assemble_shards(stages, out, tokenizer, groups, options["member_sequences"], options["shard_bytes"])
    clear(out, keep={record["entry"]["name"] for records in shards.values() for record in records})
    tokenizer.save(Path(out.path) / TOKENIZER_FILE)
    entries = {name: [record["entry"] for record in of_split] for name, of_split in shards.items()}
    hashes = write_tables(out, {name: index_columns(of_split) for name, of_split in shards.items()}, entries)
    facts = {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": str(token_type(tokenizer.vocab_size)),
        "splits": _split_facts(datasets, of_splits, entries),
        **{key: sum(dataset.manifest.get(key, 0) for dataset in datasets) for key in _COUNTS},
        "source": _source(datasets),
        "options": options,
        "rewritten": rewritten,
    }
    write_manifest(out, facts | hashes)


def _split_facts(
    datasets: Sequence[Dataset], of_splits: dict[str, list[Record]], entries: dict[str, list[Record]]
) -> dict[str, dict[str, Any]]:
    members = [sum(entry["members"] for entry in of_split) for of_split in entries.values()]
    return {
        name: {
            **length_facts(_lengths(of_splits[name])),
            **{key: sum(group[key] for group in of_splits[name]) for key in ("texts", "unknown_tokens")},
            **{key: sum(d.manifest["splits"].get(name, {}).get(key, 0) for d in datasets) for key in _LENGTH_COUNTS},
            "shards": len(entries[name]),
            "first_member": first,
            "members": count,
        }
        for name, first, count in zip(entries, itertools.accumulate(members, initial=0), members, strict=False)
    }


def _lengths(groups: Sequence[Record]) -> Counter[int]:
    total: Counter[int] = Counter()
    for group in groups:
        total.update(dict(group["lengths"]))
    return total


def _source(datasets: Sequence[Dataset]) -> dict[str, Any]:
    sources = [dataset.manifest.get("source", {}) for dataset in datasets]
    names = (str(source.get("name", "unknown")) for source in sources)
    return {"name": " + ".join(names), "files": [file for source in sources for file in source.get("files", [])]}
