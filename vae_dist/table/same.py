"""When two configurations give the same row: what belongs to the machine is left out of the comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vae_dist.config.load import canonical_json
from vae_dist.config.schema import Config

# What may differ from machine to machine: it changes a row by rounding at most, or names a place.
MACHINE_KEYS = (
    "run",
    "cluster",
    "data.source",
    "data.dir",
    "data.cache_dir",
    "data.cache_bytes",
    "data.damage",
    "data.damage_budget_fraction",
    "train.kernels",
    "train.micro_batch_tokens",
    "train.activation_checkpointing",
    "evaluate.num_samples",
    "evaluate.batch_sequences",
    "evaluate.importance_samples",
)


def neutral(config: Config) -> Config:
    """The configuration without this machine's places, which are no part of a result."""
    tree = _without_places(config.model_dump(mode="json"))
    tree["run"]["storage"], tree["data"]["cache_dir"] = "runs", None
    return Config.model_validate(tree)


def differences(before: Config, now: Config) -> list[str]:
    """What changed that a row's numbers depend on, for people."""
    old, new = (_result_values(neutral(config).model_dump(mode="json")) for config in (before, now))
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in keys]


def digest(config: Config) -> str:
    """Names what was written that decides the row; keys that the schema gains later do not change it."""
    written = config.model_dump(mode="json", exclude_unset=True)
    return hashlib.sha256(canonical_json(_result_values(written)).encode()).hexdigest()[:8]


def is_of_machine(key: str) -> bool:
    """Whether a dotted key may differ from machine to machine."""
    return any(f"{key}.".startswith(f"{name}.") for name in MACHINE_KEYS)


def _result_values(tree: dict[str, Any]) -> dict[str, Any]:
    """Leaves by dotted key, those of the machine left out."""
    return {key: value for key, value in _leaves(tree, "") if not is_of_machine(key)}


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        # An empty section is a value: `aggressive: {}` is not `aggressive: null`.
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {_without_places(key): _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~", "..", "file:")):
        return f"$VAE_DIST_DATA/{Path(value).name}"
    return value
