"""One contender in a process of its own: opens the corpus, then does what standard input says.

    check       read one pass, answer what it held
    turn N      read for N seconds, answer {"tokens": ..., "seconds": ...}

Every answer is a line of JSON on what was standard output; what libraries print goes to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from peers.contract import CONTENDERS, Epoch, Setting
from peers.gate import read_all
from peers.padding import Padded

# Read between the first batch of a turn and the start of its clock: start-up is not what is compared.
_WARM_SHARE, _WARM_SECONDS = 0.1, 1.0


def main() -> None:
    """Serve standard input until it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(CONTENDERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("batch_sequences", type=int)
    parser.add_argument("--sabotage", action="store_true", help="alter one token of each epoch, for the gate's test")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    entry, setting = CONTENDERS[options.name], Setting(options.folder.resolve(), options.batch_sequences)
    try:
        module = importlib.import_module(f"peers.{entry.module}")
    except ModuleNotFoundError as error:
        _say(answers, {"missing": str(error)})
        return
    epoch: Epoch = getattr(module, f"open_{options.name}")(setting)
    if options.sabotage:
        epoch = _altered(epoch)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", *entry.packages)}
    _say(answers, {"versions": versions})
    _serve(answers, epoch, options.batch_sequences)


def _serve(answers: TextIO, epoch: Epoch, batch_sequences: int) -> None:
    epochs = 0
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "check":
            try:
                _say(answers, asdict(read_all(epoch(epochs), batch_sequences)))
            except ValueError as error:
                _say(answers, {"refused": str(error)})
            epochs += 1
        elif command == "turn":
            result, epochs = turn(epoch, epochs, float(argument))
            _say(answers, result)


def turn(epoch: Epoch, first_epoch: int, seconds: float) -> tuple[dict[str, float], int]:
    """Read from a fresh epoch on for `seconds`, after a short warm-up; real tokens and seconds, and the next epoch."""
    warm_seconds = min(_WARM_SECONDS, _WARM_SHARE * seconds)
    first = begin = 0.0
    epochs, tokens = first_epoch, 0
    while True:
        batches = epoch(epochs)
        epochs += 1
        for _, lengths_B in batches:
            now = time.perf_counter()
            if begin:
                tokens += int(lengths_B.sum())
                if now - begin >= seconds:
                    _close(batches)
                    return {"tokens": tokens, "seconds": now - begin}, epochs
            first = first or now
            if not begin and now - first >= warm_seconds:
                begin = now


def _close(batches: Iterator[Padded]) -> None:
    if hasattr(batches, "close"):
        batches.close()


def _altered(epoch: Epoch) -> Epoch:
    def broken(number: int) -> Iterator[Padded]:
        for index, (tokens_BT, lengths_B) in enumerate(epoch(number)):
            tokens_BT[0, 0] += index == 0
            yield tokens_BT, lengths_B

    return broken


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
