"""What HTML pages share: the template environment, number formats, and writing a page whole or not at all.

A page needs no network. All texts are escaped, so they may hold any characters.
"""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from vae_dist.observe.progress import format_seconds


def render_page(template: str, **values: object) -> str:
    """A template of this folder, by name, as HTML text."""
    loader = FunctionLoader(_source)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader
    )
    environment.filters |= {
        "whole": format_whole,
        "decimal": format_decimal,
        "percent": format_percent,
        "duration": format_seconds,
    }
    return environment.get_template(template).render(values)


def write_page(page: str, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    # Half of a surrogate pair, which a broken tokenizer can produce, has no UTF-8 form.
    temporary.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    os.replace(temporary, path)


def check_keys(given: dict[str, object], required: frozenset[str], optional: frozenset[str]) -> None:
    """Refuse a dict that lacks a required key or holds one that no template shows.

    Raises:
        ValueError: names every such key, and the known ones.
    """
    missing, unknown = required - given.keys(), given.keys() - required - optional
    problems = [f"required key {key!r} is missing" for key in sorted(missing)]
    problems += [f"key {key!r} is not known" for key in sorted(unknown)]
    if problems:
        known = ", ".join(sorted(required | optional))
        raise ValueError(f"cannot render the page: {'; '.join(problems)}. Known keys: {known}")


def format_decimal(value: float | None, digits: int = 2) -> str:
    """A number with grouped thousands; NaN and inf as such, None as n/a."""
    return "n/a" if value is None else f"{value:,.{digits}f}"


def format_whole(value: float | None) -> str:
    """1234567 -> 1,234,567."""
    return format_decimal(value, 0)


def format_percent(value: float | None) -> str:
    """0.0525 -> 5.25 %."""
    return "n/a" if value is None else f"{format_decimal(100.0 * value)} %"


def _source(name: str) -> str:
    return importlib.resources.files("vae_dist.observe").joinpath(name).read_text(encoding="utf-8")
