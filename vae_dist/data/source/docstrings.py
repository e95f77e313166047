"""The docstring corpus: the summary sentences of the docstrings of the standard library and installed packages.

Real English that every machine has: nothing is downloaded, nothing is redistributed, nothing is imported
(source files are parsed with `ast`). The corpus depends on what is installed, so it is cached under a hash of
the Python version and the installed distributions.

Run as a script it is its own worker: NUL-separated paths on standard input, JSON on standard output.
"""

from __future__ import annotations

import ast
import gc
import gzip
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MIN_WORDS, MAX_WORDS = 3, 40
# Part of the cache key: raise it when a rule below changes what is harvested.
_RULES_VERSION = 2
_MIN_LETTER_SHARE = 0.75
_MIN_PLAIN_WORD_SHARE = 0.7
_MIN_FILES_PER_TASK = 100

_ROLE = re.compile(r":[a-zA-Z:]+:`~?([^`<]*?)(?:\s*<[^>]*>)?`")
_BACKTICKS = re.compile(r"`+_?")
# Lines that end a summary although no blank line does: fields, bullets, section names of the docstring styles.
_FIELD = re.compile(
    r"\s*(?:[:@][a-zA-Z]|[-*+] |\d+[.)] |(?:Args?|Arguments|Parameters?|Returns?|Yields?|Raises?|Notes?|Examples?|Usage"
    r"|Attributes|See Also)\s*:?\s*$)"
)
# A sentence ends at a full stop, question or exclamation mark before white space and a capital, or at the end.
_SENTENCE = re.compile(r"(.+?[.!?])(?=\s+[A-Z(]|$)")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|cf|vs|resp|approx|Fig|Eq|Sec|No|[A-Z]|a\.k\.a|et al)\.$")
_REFUSED = re.compile(r"https?:|www\.|>>>|[{}\[\]<>|\\=@#$%^*_~]|::|--|\s:\w|\bTODO\b|\bXXX\b|\.\.|\w\.\w+\(")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")


@dataclass(frozen=True)
class Harvest:
    """A cached corpus: one sentence a line in `path`, gzipped."""

    path: Path
    sentences: int
    words: int


def harvest_docstrings(cache_dir: Path, roots: Iterable[Path] | None = None, workers: int | None = None) -> Harvest:
    """The corpus as a gzip text file under `cache_dir`, made if it is not there.

    Args:
        cache_dir: created if missing.
        roots: folders of Python sources; default the standard library and site-packages.
        workers: processes; default one per available CPU. The result does not depend on it: files are read
            in sorted order and the first of equal sentences is kept.
    """
    folders = list(roots) if roots is not None else _installed_roots()
    path = cache_dir / f"docstrings-{_fingerprint(folders, installed=roots is None)}.txt.gz"
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return _harvest(path, lines)
    started = time.monotonic()
    files = [file for root in folders for file in _python_files(root)]
    logger.info("harvesting docstrings from %d files; this happens once", len(files))
    sentences: dict[str, None] = {}
    unreadable = 0
    for found, failed in _scan(files, workers or len(os.sched_getaffinity(0))):
        sentences.update(dict.fromkeys(found))
        unreadable += failed
    _write(path, sentences)
    harvest = _harvest(path, sentences)
    logger.info(
        "docstring corpus: %d sentences, %d words from %d files in %.0f s; %d files could not be parsed",
        *(harvest.sentences, harvest.words, len(files), time.monotonic() - started, unreadable),
    )
    return harvest


def sentences_of(source: bytes) -> Iterator[str]:
    """Summary sentences of all docstrings in a module's source, outermost first.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: the source does not parse.
    """
    with warnings.catch_warnings():
        # Invalid escapes in other people's sources are none of the user's business.
        warnings.simplefilter("ignore")
        level: list[ast.AST] = [ast.parse(source)]
    while level:
        for node in level:
            docstring = ast.get_docstring(node, clean=False) if isinstance(node, _Documented) else None
            sentence = summary_sentence(docstring) if docstring else None
            if sentence:
                yield sentence
        # Statements only: definitions never hide inside expressions, which are most of the tree.
        level = [child for node in level for block in _BLOCKS for child in _block(node, block)]


def summary_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring's first paragraph as plain English, or None if it is not that.

    Roles and backticks are reduced to their text. Refused are: fewer than 3 or more than 40 words, code-like
    characters, doctests, links, field lists, fewer than three quarters letters, and a start without a capital.
    """
    text = _BACKTICKS.sub("", _ROLE.sub(r"\1", _first_paragraph(docstring)))
    sentence = _first_sentence(text)
    if not sentence or not sentence[0].isupper() or _REFUSED.search(sentence) or not sentence.isascii():
        return None
    words = sentence.split()
    letters = sum(c.isalpha() for c in sentence)
    if not MIN_WORDS <= len(words) <= MAX_WORDS or letters < _MIN_LETTER_SHARE * len("".join(words)):
        return None
    # Most words of English are words: a signature or a table row is not.
    plain = sum(1 for w in words if _WORD.fullmatch(w.strip(".,;:!?()'\"")))
    return sentence if plain >= _MIN_PLAIN_WORD_SHARE * len(words) else None


def _first_paragraph(docstring: str) -> str:
    lines: list[str] = []
    for line in docstring.strip().splitlines():
        if not line.strip() or (lines and _FIELD.match(line)):
            break
        lines.append(line)
    return " ".join(" ".join(lines).split())


def _first_sentence(text: str) -> str:
    end = 0
    for match in _SENTENCE.finditer(text):
        end = match.end()
        if not _ABBREVIATION.search(text[:end]):
            return text[:end].strip()
    # A summary line without a full stop is a sentence all the same.
    return text.strip() if end == 0 and text[-1:].isalnum() else text[:end].strip()


def _block(node: ast.AST, name: str) -> list[ast.AST]:
    block = getattr(node, name, None)
    # A lambda and a conditional expression also have a `body`, which is no list.
    return block if isinstance(block, list) else []


def _harvest(path: Path, sentences: Iterable[str]) -> Harvest:
    counts = [len(sentence.split()) for sentence in sentences]
    return Harvest(path, len(counts), sum(counts))


def _write(path: Path, sentences: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # No name and no time in the gzip header: the same sentences give the same bytes.
    with open(temporary, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed:
        packed.write("".join(f"{s}\n" for s in sentences).encode("ascii"))
    os.replace(temporary, path)


def _installed_roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(p) for p in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"]))]


def _fingerprint(folders: list[Path], installed: bool) -> str:
    if installed:
        facts = sorted({f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()})
    else:
        files = [(f, f.stat()) for root in folders for f in _python_files(root)]
        facts = [f"{f}:{stat.st_size}:{stat.st_mtime_ns}" for f, stat in files]
    text = "\n".join([str(_RULES_VERSION), platform.python_version(), *facts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _python_files(root: Path) -> list[Path]:
    """Sources below `root` in sorted order; the standard library's folder does not include site-packages."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            d for d in folders if d != "__pycache__" and not (d == "site-packages" and Path(folder) == root)
        )
        found += [Path(folder) / n for n in sorted(names) if n.endswith(".py")]
    return found


def _scan(files: list[Path], workers: int) -> Iterator[tuple[list[str], int]]:
    size = max(_MIN_FILES_PER_TASK, -(-len(files) // (8 * workers)))
    tasks = [files[i : i + size] for i in range(0, len(files), size)]
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(_scan_in_process, tasks)


def _scan_in_process(files: list[Path]) -> tuple[list[str], int]:
    # A plain process: multiprocessing would fork a caller with threads (Ray, torch) or import its main module again.
    command = [sys.executable, "-I", "-S", __file__]
    done = subprocess.run(command, input=b"\0".join(map(os.fsencode, files)), stdout=subprocess.PIPE, check=True)
    sentences, unreadable = json.loads(done.stdout)
    return sentences, unreadable


def _scan_files(files: list[str]) -> tuple[list[str], int]:
    sentences: list[str] = []
    unreadable = 0
    for file in files:
        try:
            source = Path(file).read_bytes()
            if b'"""' in source or b"'''" in source:
                sentences += sentences_of(source)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            unreadable += 1
    return sentences, unreadable


if __name__ == "__main__":
    # Syntax trees hold no cycles, and the collector would walk them over and over.
    gc.disable()
    paths = sys.stdin.buffer.read().split(b"\0")
    print(json.dumps(_scan_files([os.fsdecode(path) for path in paths])))
