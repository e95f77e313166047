"""What the commands of `vae-dist` share: how they are declared, and arguments that several take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vae_dist.errors import ConfigError

# Seeds are added to row numbers and must stay inside 64 bits.
_LARGEST = 2**62
Command = Callable[[argparse.Namespace], dict[str, Any] | None]
"""Returns what is printed as the last line, or None where it prints by itself."""


def add_command(group: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    """A command with its one line of help."""
    one: argparse.ArgumentParser = group.add_parser(name, help=text, description=text)
    one.set_defaults(command=command)
    return one


def show(result: dict[str, Any]) -> None:
    """The last line of standard output."""
    print(json.dumps(result, ensure_ascii=False))


def at_least(minimum: float) -> Callable[[str], Any]:
    """A parser for numbers of the minimum's type that are not below it."""
    kind = type(minimum)

    def parse(text: str) -> Any:
        value = kind(text)
        if not minimum <= value <= _LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is not between {minimum} and {_LARGEST}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def new_file(text: str) -> Path:
    """A path that a file may be written to without replacing anything."""
    path = Path(text).expanduser().absolute()
    if not text or "://" in text:
        raise ConfigError(f"{text!r} is no local file. Give a path.")
    if path.exists():
        raise ConfigError(f"{path} exists. Choose another name, or delete it.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no directory. Make it, or choose another one.")
    return path
