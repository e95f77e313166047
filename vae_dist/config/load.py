"""Load a configuration: defaults < one YAML file < `key.path=value`, every problem reported at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vae_dist.config.checks import cross_field_problems
from vae_dist.config.credentials import without_credentials
from vae_dist.config.schema import Config
from vae_dist.errors import ConfigError

KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-3 as text, for want of a point; everyone who writes it means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_YAML_PROBLEMS = (yaml.YAMLError, ValueError, RecursionError)
SectionT = TypeVar("SectionT", bound=BaseModel)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration.

    Args:
        path: a YAML file, or None for the embedded default.
        overrides: `key.path=value` strings; values are YAML scalars, lists or mappings.

    Raises:
        ConfigError: all problems found (unknown keys with the nearest real one and the YAML line,
            wrong types, values out of range, combinations that cannot work), in one message.
    """
    tree, lines = _read_yaml(Path(path)) if path is not None else ({}, {})
    origin = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        _apply_override(tree, override, origin)
    config = _validate(Config, tree, origin)
    problems = cross_field_problems(config)
    if problems:
        raise ConfigError(_list_problems(problems))
    return config


def load_section(section: type[SectionT], path: Path | None, given: dict[str, Any]) -> SectionT:
    """One section that is a YAML file of its own; `given` values, such as command-line flags, come before the file's.

    Raises:
        ConfigError: all problems found, as `load_config` tells them.
    """
    tree, lines = _read_yaml(path) if path is not None else ({}, {})
    origin = {key: f"{path}:{line}" for key, line in lines.items()} | {(key,): "command line" for key in given}
    return _validate(section, tree | given, origin)


def validate_section(section: type[SectionT], values: dict[str, Any]) -> SectionT:
    """One section from values that did not come from a file, such as command-line flags.

    Raises:
        ConfigError: all wrong values, in one message.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems = [f"{e['loc'][-1]} = {e['input']!r}: {e['msg'][0].lower()}{e['msg'][1:]}." for e in error.errors()]
        raise ConfigError(_list_problems(problems)) from None


def _validate(section: type[SectionT], tree: dict[str, Any], origin: dict[KeyPath, str]) -> SectionT:
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_list_problems([_describe(e, section, tree, origin) for e in error.errors()])) from None


def dump_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one, but for credentials in URLs."""
    return without_credentials(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def canonical_json(value: BaseModel | dict[str, Any]) -> str:
    """JSON with sorted keys: the same value always gives the same text, fit for hashing."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, _names_beside(path), n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"There is no configuration file {path}.{hint}")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader)
    except _YAML_PROBLEMS as error:
        raise ConfigError(f"{path} is not readable as YAML: {error}") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections (data:, model:, ...), not {type(tree).__name__}.")
    return tree, dict(_key_lines(node, ()))


def _names_beside(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []


def _key_lines(node: Any, prefix: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*prefix, str(key.value))
            yield here, key.start_mark.line + 1
            yield from _key_lines(value, here)


def _apply_override(tree: dict[str, Any], override: str, origin: dict[KeyPath, str]) -> None:
    dotted, separator, text = override.partition("=")
    keys = tuple(dotted.split("."))
    if not separator or not all(keys):
        raise ConfigError(f"Override {override!r} is not of the form key.path=value, such as train.seed=1.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except _YAML_PROBLEMS as error:
        raise ConfigError(f"The value in override {override!r} is not YAML: {error}") from None
    branch = tree
    for key in keys[:-1]:
        branch = branch.setdefault(key, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"Override {override!r}: {key!r} is a value, not a section.")
    branch[keys[-1]] = value
    origin[keys] = f"override {override!r}"


def _describe(error: Any, section: type[BaseModel], tree: dict[str, Any], origin: dict[KeyPath, str]) -> str:
    # pydantic names the chosen variant of a union in the location ("encoder", "lstm", "hidden_dim").
    keys = tuple(str(part) for part in error["loc"])
    written = _written_path(keys, tree)
    where = _origin_of(written, origin)
    name = ".".join(written)
    if error["type"] == "extra_forbidden":
        siblings = _fields_beside(section, keys)
        near = difflib.get_close_matches(keys[-1], siblings, n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]!r}?" if near else f"Known keys here: {', '.join(siblings)}."
        return f"{where}: unknown key {name!r}. {fix}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{where}: {name} = {error['input']!r}: {message}."


def _origin_of(written: KeyPath, origin: dict[KeyPath, str]) -> str:
    """Where a key was written: itself, else what it lies in, else what was written inside it."""
    around = [written[:n] for n in range(len(written), 0, -1)]
    inside = [key for key in origin if key[: len(written)] == written]
    return next((origin[key] for key in (*around, *inside) if key in origin), "defaults")


def _written_path(keys: KeyPath, tree: dict[str, Any]) -> KeyPath:
    written: list[str] = []
    branch: Any = tree
    for key in keys:
        if isinstance(branch, dict) and key not in branch and key in _KINDS:
            continue
        written.append(key)
        branch = branch.get(key) if isinstance(branch, dict) else None
    return tuple(written)


def _kinds(section: type[BaseModel]) -> set[str]:
    """Every `kind` that a part anywhere below `section` can have."""
    parts = {part for field in section.model_fields.values() for part in _sections_in(field.annotation)}
    own = {section.model_fields["kind"].default} if "kind" in section.model_fields else set()
    return own.union(*(_kinds(part) for part in parts))


def _fields_beside(section: type[BaseModel], keys: KeyPath) -> list[str]:
    """Field names of the part of a section that the last key of the path was written in."""
    for key in keys[:-1]:
        if key in section.model_fields:
            options = _sections_in(section.model_fields[key].annotation)
            section = options[0] if options else section
            variants = options
        else:
            # The tag of a union's variant, such as "lstm".
            section = next((v for v in variants if v.model_fields["kind"].default == key), section)
    return sorted(section.model_fields)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections a field can hold, looking through Annotated and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


_KINDS = _kinds(Config)


def _list_problems(problems: list[str]) -> str:
    if len(problems) == 1:
        return f"The configuration has a problem: {problems[0]}"
    listing = "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
    return f"The configuration has {len(problems)} problems:\n{listing}"
