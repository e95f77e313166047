"""A table's jobs: a row and a seed each, with the command that trains it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vae_dist.config.load import load_config
from vae_dist.config.schema import Config
from vae_dist.errors import ConfigError
from vae_dist.table.definition import Definition, Row, read_definition, slug
from vae_dist.table.same import MACHINE_KEYS, digest, is_of_machine

_GIVEN_BY_THE_TABLE = ("train.seed", "run.name")


@dataclass(frozen=True)
class Job:
    """A row and a seed.

    Attributes:
        shared: arguments of `vae_dist.train` that are the same on every machine.
        machine: further overrides, of this machine.
        config: what they come to.
    """

    row: Row
    seed: int
    shared: tuple[str, ...]
    machine: tuple[str, ...]
    config: Config

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.row.method}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Of its files, beside the table's results."""
        return f"{self.row.slug}-seed{self.seed}"

    @property
    def run_dir(self) -> Path:
        """Where it is trained."""
        return Path(self.config.run.storage).resolve() / str(self.config.run.name)

    @property
    def has_latent(self) -> bool:
        """False of a language model."""
        return self.config.model.latent != "none"

    @property
    def arguments(self) -> list[str]:
        """Of `vae_dist.train`."""
        # The name last: `run={...}` of this machine must not undo it.
        return [*self.shared, *self.machine, f"run.name={self.config.run.name}"]

    @property
    def command(self) -> str:
        """As typed in a shell; without what belongs to this machine."""
        return f"python -m vae_dist.train {shlex.join(self.shared)} run.name={self.config.run.name}"


@dataclass(frozen=True)
class Table:
    """A table file and its jobs in order."""

    path: Path
    definition: Definition
    jobs: list[Job]

    @property
    def name(self) -> str:
        """The file's, without its ending."""
        return table_name(self.path)

    def jobs_of(self, methods: Sequence[str]) -> list[Job]:
        """The jobs of these methods, given by name or slug, several in one text with commas; all when none is given.

        Raises:
            ConfigError: there is no such row.
        """
        known = dict.fromkeys(job.row.slug for job in self.jobs)
        wanted = {slug(name) for text in methods for name in text.split(",")}
        if unknown := wanted - known.keys():
            raise ConfigError(f"{self.path} has no row {', '.join(sorted(unknown))}. It has {', '.join(known)}.")
        return [job for job in self.jobs if not methods or job.row.slug in wanted]


def load_table(path: Path, machine: Sequence[str] = ()) -> Table:
    """Read a table file and resolve every row, so that what cannot work is known before anything is trained.

    Args:
        machine: `key.path=value` for this machine; only `MACHINE_KEYS`.

    Raises:
        ConfigError: the file, a row or an override is wrong; says where.
    """
    for override in machine:
        key = override.partition("=")[0]
        if key in _GIVEN_BY_THE_TABLE or not is_of_machine(key):
            raise ConfigError(
                f"{override!r} would change what the rows mean. Write it into the overrides of {path}; the command "
                f"line takes {', '.join(MACHINE_KEYS)}."
            )
    definition = read_definition(path)
    if not Path(definition.base).is_file():
        raise ConfigError(
            f"{path}: base = {definition.base} is no file. It is looked for from the working directory, {Path.cwd()}."
        )
    slugs = [row.slug for row in definition.rows]
    if twice := {name for name in slugs if slugs.count(name) > 1}:
        raise ConfigError(f"{path} has two rows called {', '.join(sorted(twice))}. Give each method its own name.")
    jobs = [_job(path, definition, row, seed, machine) for row in definition.rows for seed in dict.fromkeys(row.seeds)]
    return Table(path, definition, jobs)


def table_name(path: Path) -> str:
    """`ptb` of ptb.table.yaml: what results and runs are called by."""
    return path.name.removesuffix(".yaml").removesuffix(".table")


def _job(path: Path, definition: Definition, row: Row, seed: int, machine: Sequence[str]) -> Job:
    overrides = [*definition.overrides, *row.overrides]
    for override in overrides:
        if override.partition("=")[0] in _GIVEN_BY_THE_TABLE:
            raise ConfigError(
                f"{path}, row {row.method!r}: {override!r} is the table's own to say. Seeds are listed under `seeds`."
            )
    overrides.append(f"train.seed={seed}")
    try:
        # A row that was changed gets a new run directory.
        name = f"{slug(table_name(path))}-{row.slug}-seed{seed}-{digest(load_config(definition.base, overrides))}"
        config = load_config(definition.base, [*overrides, *machine, f"run.name={name}"])
    except ConfigError as error:
        raise ConfigError(f"{path}, row {row.method!r}: {error.message}") from None
    return Job(row, seed, (definition.base, *overrides), tuple(machine), config)
