"""Data loaders compared: ours and others, each at its best, on the same tokens, on one core, in one run.

    make bench-data ARGS="--only ours datasets --seconds 10"

Each contender is a process of its own. It first reads a pass that must hold exactly the corpus's sequences; a
contender that fails this is refused and gets no speed. Then the contenders are timed in turns, A B C ... A B C ...,
only one at work at a time, all from the page cache, all ending in padded int64 tensors and lengths. The last line of
output is one JSON object; the status is 1 when a contender was refused or failed, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers.contract import CONTENDERS, PACKED_BLOCK_TOKENS
from peers.corpus import make_corpus, packed_content, read_content
from peers.gate import Content
from peers.process import ContenderError, NotInstalledError, Process

_ROOT = Path(__file__).resolve().parents[2]
_TOKENS, _QUICK_SECONDS = 24_000_000, 0.5


@dataclass
class Result:
    """What is known of a contender.

    Attributes:
        speeds: real tokens per second, one a turn.
        refused: why it has no speed.
    """

    speeds: list[float] = field(default_factory=list)
    padding_fraction: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    refused: str | None = None
    is_installed: bool = True

    @property
    def median(self) -> float:
        """Tokens per second."""
        return statistics.median(self.speeds)


def main() -> int:
    """Run the comparison for each batch size; the process's status."""
    options = _parse()
    # Contenders wait stopped: they must be woken to end, whatever ends the comparison.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    core = max(os.sched_getaffinity(0))
    corpus = make_corpus(options.data, options.cache, options.tokens)
    content = read_content(corpus)
    print(f"{content.sequences:,} sequences, {content.tokens:,} tokens, core {core}")
    reports, is_clean = [], True
    for batch_sequences in options.batch_sequences:
        results = _compare(options, corpus, core, batch_sequences)
        print(_table(results, batch_sequences), flush=True)
        reports.append(_report(results, options, batch_sequences))
        is_clean &= all(result.refused is None or not result.is_installed for result in results.values())
    print(json.dumps(reports[0] | ({"more_batch_sequences": reports[1:]} if reports[1:] else {})))
    return 0 if is_clean else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a turn (default 10)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each contender (default 3)")
    parser.add_argument("--batch-sequences", type=int, nargs="+", default=[512], help="one or more (default 512)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CONTENDERS), default=list(CONTENDERS),
                        help=f"some of: {', '.join(CONTENDERS)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="short turns over a small corpus: a check, no measurement")
    parser.add_argument("--tokens", type=int, default=_TOKENS, help="the corpus is repeated up to so many")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("VAE_DIST_DATA", _ROOT / "../shared/data")),
                        help="folder with multi30k_en and ptb (default $VAE_DIST_DATA)")  # fmt: skip
    parser.add_argument("--cache", type=Path, default=_ROOT / ".bench", help="where everything that is made is kept")
    parser.add_argument("--sabotage", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.tokens = _QUICK_SECONDS, 0
    if not (options.data / "ptb").is_dir() or not (options.data / "multi30k_en").is_dir():
        parser.error(f"{options.data} lacks multi30k_en or ptb; set VAE_DIST_DATA or --data")
    return options


def _compare(options: argparse.Namespace, corpus: Path, core: int, batch_sequences: int) -> dict[str, Result]:
    results = {name: Result() for name in options.only}
    processes: dict[str, Process] = {}
    try:
        for name, result in results.items():
            print(f"checking {name} ...", file=sys.stderr, flush=True)
            process = _open(name, result, options, corpus, core, batch_sequences)
            if process is not None:
                processes[name] = process
        for turn in range(options.turns):
            for name, process in list(processes.items()):
                print(f"turn {turn + 1} of {options.turns}: {name} ...", file=sys.stderr, flush=True)
                if not _time(process, results[name], options.seconds):
                    processes.pop(name).close()
    finally:
        for process in processes.values():
            process.close()
    return results


def _open(
    name: str, result: Result, options: argparse.Namespace, corpus: Path, core: int, batch_sequences: int
) -> Process | None:
    """A contender that has passed the gate, or None and the reason in `result`."""
    process = None
    try:
        process = Process(name, corpus, options.cache, core, batch_sequences, is_altered=options.sabotage == name)
        result.versions = process.versions
        _pass_gate(process, result, packed_content(corpus, PACKED_BLOCK_TOKENS) if _is_packed(name) else
                   read_content(corpus))  # fmt: skip
    except NotInstalledError as missing:
        result.refused, result.is_installed = str(missing), False
    except ContenderError as error:
        result.refused = str(error)
        if process is not None:
            process.close()
    return process if result.refused is None else None


def _pass_gate(process: Process, result: Result, expected: Content) -> None:
    answer = process.ask("check")
    if "refused" in answer:
        raise ContenderError(f"wrong result: {answer['refused']}")
    found = Content(**answer["content"])
    if found != expected:
        raise ContenderError(f"wrong result: a pass holds {asdict(found)}, not {asdict(expected)}")
    result.padding_fraction = 1 - found.tokens / answer["positions"]


def _time(process: Process, result: Result, seconds: float) -> bool:
    """Give a contender its turn; False when it died."""
    try:
        answer = process.ask(f"turn {seconds}")
    except ContenderError as error:
        result.refused = str(error)
        return False
    result.speeds.append(answer["tokens"] / answer["seconds"])
    return True


def _is_packed(name: str) -> bool:
    return not CONTENDERS[name].same_job


def _table(results: dict[str, Result], batch_sequences: int) -> str:
    ours = results.get("ours")
    lines = [
        f"\nBatches of {batch_sequences} sequences, millions of real tokens a second:",
        f"{'loader':20}{'median':>8}{'min':>8}{'max':>8}{'ours/it':>9}{'padding':>9}  how",
    ]
    for name, result in results.items():
        if result.refused is not None:
            lines.append(f"{name:20}{'not installed' if not result.is_installed else 'REFUSED'}: {result.refused}")
            continue
        speeds = [speed / 1e6 for speed in (result.median, min(result.speeds), max(result.speeds))]
        is_ours_known = ours is not None and ours.refused is None
        ratio = f"{ours.median / result.median:.2f}" if ours is not None and is_ours_known else "-"
        version = result.versions[CONTENDERS[name].packages[0]]
        lines.append(
            f"{name:20}{speeds[0]:8.2f}{speeds[1]:8.2f}{speeds[2]:8.2f}{ratio:>9}{result.padding_fraction:9.3f}"
            f"  {version}: {CONTENDERS[name].note}"
        )
    return "\n".join(lines)


def _report(results: dict[str, Result], options: argparse.Namespace, batch_sequences: int) -> dict[str, Any]:
    timed = {name: result for name, result in results.items() if result.refused is None}
    ours = timed.pop("ours", None)
    rivals = [result.median for name, result in timed.items() if CONTENDERS[name].same_job]
    return {
        "tokens_per_second": ours.median if ours else None,
        "padding_fraction": ours.padding_fraction if ours else None,
        "peers": {name: result.median for name, result in timed.items()},
        "ratio_best_peer": ours.median / max(rivals) if ours and rivals else None,
        "not_the_same_job": [name for name in timed if _is_packed(name)],
        "refused": {n: r.refused for n, r in results.items() if r.refused is not None and r.is_installed},
        "not_installed": {n: r.refused for n, r in results.items() if not r.is_installed},
        "speeds": {name: result.speeds for name, result in results.items() if result.refused is None},
        "batch_sequences": batch_sequences,
        "turns": options.turns,
        "seconds": options.seconds,
        "versions": {name: result.versions for name, result in results.items() if result.versions},
    }


if __name__ == "__main__":
    sys.exit(main())
