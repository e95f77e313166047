"""The table file: rows of one base configuration, how they are evaluated, and published rows beside them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from vae_dist.config.section import Name, NonNegative, Positive, Section
from vae_dist.errors import ConfigError


class Row(Section):
    """One method, trained once for each seed."""

    method: Annotated[str, Field(pattern="[A-Za-z0-9]")]
    note: str = ""
    """Shown with the row."""
    overrides: list[str] = Field(default_factory=list)
    """`key.path=value`, after the table's own."""
    seeds: list[NonNegative] = Field(default=[0], min_length=1)

    @property
    def slug(self) -> str:
        """The method's name in paths and on the command line."""
        return slug(self.method)


class Evaluation(Section):
    """How a finished run is scored, once: under the mixture that samples come from where it has one."""

    split: Name = "test"
    importance_samples: NonNegative = 500
    """K of the importance-weighted bound; a model without a latent has none."""
    batch_sequences: Positive = 64
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    texts: bool = False
    """Also measure what the model writes, and keep samples, reconstructions and interpolations with the results: for
    corpora whose licence lets their texts be passed on."""


class Peer(Section):
    """A published row; PPL per word, nats per sequence; null where nothing is published."""

    method: Name
    elbo_ppl: float | None = None
    """From -ELBO; of a language model, its perplexity."""
    iw_ppl: float | None = None
    rec_per_seq: float | None = None
    kl_per_seq: float | None = None
    mutual_information_nats: float | None = None
    active_units: int | None = None
    status: Literal["V", "M*", "M"]
    """V: read in a repository. M*: second hand, NLL and PPL agree under the token count. M: second hand."""
    source: Name
    not_comparable: Name | None = None
    """Why its numbers cannot be held against the others'."""


class Definition(Section):
    """The table file."""

    base: Name
    """The configuration of all rows; like all paths, from the working directory."""
    overrides: list[str] = Field(default_factory=list)
    """`key.path=value` for all rows."""
    rows: list[Row] = Field(min_length=1)
    evaluation: Evaluation = Evaluation()
    peers: list[Peer] = Field(default_factory=list)


def slug(text: str) -> str:
    """A name fit for paths and command lines."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def read_definition(path: Path) -> Definition:
    """Read a table file.

    Raises:
        ConfigError: it is missing, no YAML, or has unknown keys or wrong values; lists all of them.
    """
    if not path.is_file():
        raise ConfigError(f"There is no table file {path}.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping: {', '.join(Definition.model_fields)}.")
    try:
        return Definition.model_validate(tree)
    except ValidationError as error:
        problems = "".join(f"\n  {_problem(e)}" for e in error.errors())
        raise ConfigError(f"{path} is no table file:{problems}") from None


def _problem(error: Any) -> str:
    where = error["loc"]
    name = ".".join(map(str, where))
    if error["type"] == "extra_forbidden":
        parts: dict[str, type[Section]] = {"rows": Row, "peers": Peer, "evaluation": Evaluation}
        part = parts[where[0]] if len(where) > 1 else Definition
        return f"{name}: unknown key. Known keys here: {', '.join(part.model_fields)}."
    if "overrides" in where and isinstance(error["input"], dict):
        return f"{name} = {error['input']!r}: YAML took it for a mapping. Put quotes around the whole override."
    return f"{name} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}."
