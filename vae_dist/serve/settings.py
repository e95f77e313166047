"""What a service is told: serve.yaml and flags of `vae-dist serve`, `args` of the application on a cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from vae_dist.config.section import Name, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from vae_dist.decode.engine import SLOTS
from vae_dist.errors import ConfigError
from vae_dist.export.model_dir import load_model

_NAMED = re.compile(r"([\w.-]{1,64})=(.+)", re.DOTALL)


class ServiceConfig(Section):
    """`args` of `import_path: vae_dist.serve.app:build`. Every replica has all models."""

    models: Annotated[dict[Name, Name], Field(min_length=1)]
    """Model or run directories by name, on storage that all replicas see; the first is for requests that name none."""
    texts: Annotated[list[Name], Field(default_factory=list)]
    """Data set directories, or their URLs, whose validation texts the map shows to whoever may ask."""
    min_replicas: Positive = 1
    """As many are always there."""
    max_replicas: Positive = 1
    """Above min_replicas: as many as `target_requests` asks for."""
    target_requests: Positive = 32
    """Requests under way at a replica for which another is started."""
    upscale_delay_s: NonNegativeFloat = 30.0
    """How long more replicas must have been asked for before they are started."""
    downscale_delay_s: NonNegativeFloat = 600.0
    """How long fewer must have been enough before one is ended, which finishes what it has."""
    threads: Positive | None = None
    """Threads of a replica; it asks Ray for as many CPUs. Default: the machine's cores divided by max_replicas, with
    one CPU of Ray's."""
    gpus: NonNegativeFloat = 0.0
    """Of a replica; without any it computes on its CPUs."""
    slots: Positive = SLOTS
    """Rows that a model decodes at a time."""
    queue: NonNegative = 1024
    """Rows that wait for a slot; more are refused with 429."""
    token_budget: Positive | None = None
    """Most tokens that all rows of a model may still ask for. Default: what fills slots and queue."""
    request_timeout_s: PositiveFloat = 60.0
    """No request lives longer, streams included: then 504. A model or replica that is replaced lives on for as long."""
    reload_every_s: PositiveFloat = 2.0
    """How often a replica looks whether a model's directory has another export."""
    keys: Name | None = None
    """A file of NAME:KEY lines, mode 0600; without one the environment variable VAE_DIST_API_KEYS is read."""
    requests_per_minute: Positive | None = None
    """Of each key at one replica, without keys of all callers together. Default: no limit."""

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is below min_replicas = {self.min_replicas}")
        return self


class ServeConfig(ServiceConfig):
    """serve.yaml of `vae-dist serve`."""

    host: Name = "127.0.0.1"
    """Address to listen on; another than loopback needs keys."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port to listen on."""


def named_models(given: Sequence[str]) -> dict[str, str]:
    """Directories by name from NAME=DIR; a DIR without a name has that of its run.

    Raises:
        ModelError: a directory without a name is no model.
        ConfigError: two have the same name.
    """
    models: dict[str, str] = {}
    for one in given:
        match = _NAMED.fullmatch(one)
        name, path = match.groups() if match else (_name_of(Path(one)), one)
        if name in models:
            raise ConfigError(f"Two models are called {name}. Give one another name: NAME={path}.")
        models[name] = path
    return models


def _name_of(path: Path) -> str:
    loaded = load_model(path)
    return str(loaded.info["provenance"].get("run", loaded.path.name))
