"""The docstring corpus: the summary sentences of the docstrings of the standard library and installed packages.

Real English that every machine has: nothing is downloaded, nothing is redistributed, nothing is imported
(source files are parsed with `ast`). The corpus depends on what is installed, so it is cached under a hash of
the Python version and the installed distributions.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.metadata
import logging
import multiprocessing
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MIN_WORDS, MAX_WORDS = 3, 40
_MIN_LETTER_SHARE = 0.75
_FILES_PER_TASK = 100

_ROLE = re.compile(r":[a-zA-Z:]+:`~?([^`<]*?)(?:\s*<[^>]*>)?`")
_BACKTICKS = re.compile(r"`+_?")
_SPACES = re.compile(r"\s+")
# A sentence ends at a full stop, question or exclamation mark before white space and a capital, or at the end.
_SENTENCE = re.compile(r"(.+?[.!?])(?=\s+[A-Z(]|$)")
_ABBREVIATIONS = re.compile(r"\b(?:e\.g|i\.e|etc|cf|vs|resp|a\.k\.a|et al)\.$")
_REFUSED = re.compile(r"https?://|>>>|[{}\[\]<>|\\=@#$%^*_~]|::|--|\bTODO\b|\bXXX\b|\.\.")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")


@dataclass(frozen=True)
class Harvest:
    """A cached corpus: one sentence a line in `path`, and how it came about."""

    path: Path
    sentences: int


def harvest_docstrings(cache_dir: Path, roots: Iterable[Path] | None = None) -> Harvest:
    """The corpus as a gzip text file under `cache_dir`, made if it is not there.

    Args:
        cache_dir: created if missing.
        roots: folders of Python sources; default the standard library and site-packages.

    The result is the same whatever the number of processes: files are read in sorted order and the first of
    equal sentences is kept.
    """
    folders = list(roots) if roots is not None else _installed_roots()
    path = cache_dir / f"docstrings-{_fingerprint(folders, default=roots is None)}.txt.gz"
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return Harvest(path, sum(1 for _ in lines))
    files = [file for root in folders for file in _python_files(root)]
    logger.info("harvesting docstrings from %d files", len(files))
    sentences: dict[str, None] = {}
    unreadable = 0
    for found, failed in _scan(files):
        sentences.update(dict.fromkeys(found))
        unreadable += failed
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    # mtime=0: the same sentences give the same bytes.
    with open(temporary, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1, mtime=0) as packed:
        packed.write("".join(f"{s}\n" for s in sentences).encode("utf-8"))
    os.replace(temporary, path)
    words = sum(len(s.split()) for s in sentences)
    logger.info(
        "docstring corpus: %d sentences, %d words; %d files could not be parsed", len(sentences), words, unreadable
    )
    return Harvest(path, len(sentences))


def sentences_of(source: str) -> Iterator[str]:
    """Summary sentences of all docstrings in a module's source, in order of appearance.

    Raises:
        SyntaxError, ValueError, RecursionError: the source does not parse.
    """
    with warnings.catch_warnings():
        # Invalid escapes in other people's sources are none of the user's business.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            sentence = summary_sentence(docstring) if docstring else None
            if sentence:
                yield sentence


def summary_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring's first paragraph as plain English, or None if it is not that.

    Roles and backticks are reduced to their text. Refused are: fewer than 3 or more than 40 words, code-like
    characters, doctests, links, fewer than three quarters letters, and a start without a capital letter.
    """
    paragraph = _SPACES.sub(" ", docstring.strip().split("\n\n", 1)[0]).strip()
    text = _BACKTICKS.sub("", _ROLE.sub(r"\1", paragraph))
    sentence = _first_sentence(text)
    if not sentence or not sentence[0].isupper() or _REFUSED.search(sentence) or not sentence.isascii():
        return None
    words = sentence.split()
    letters = sum(c.isalpha() for c in sentence)
    plain = sum(1 for w in words if _WORD.fullmatch(w.strip(".,;:!?()'\"")))
    if not MIN_WORDS <= len(words) <= MAX_WORDS or letters < _MIN_LETTER_SHARE * len(sentence.replace(" ", "")):
        return None
    # Most words of English are words: a signature or a table row is not.
    return sentence if plain >= 0.7 * len(words) else None


def _first_sentence(text: str) -> str:
    end = 0
    for match in _SENTENCE.finditer(text):
        end = match.end()
        if not _ABBREVIATIONS.search(text[:end]):
            return text[:end].strip()
    # A summary line without a full stop is a sentence all the same.
    return text.strip() if end == 0 and text[-1:].isalnum() else text[:end].strip()


def _installed_roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(p) for p in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"]))]


def _fingerprint(folders: list[Path], default: bool) -> str:
    if default:
        distributions = sorted(f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions())
        text = "\n".join([platform.python_version(), *distributions])
    else:
        text = "\n".join(f"{f}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for r in folders for f in _python_files(r))
    rules = f"{MIN_WORDS}:{MAX_WORDS}:{_MIN_LETTER_SHARE}:{_REFUSED.pattern}:{_SENTENCE.pattern}"
    return hashlib.sha256(f"{rules}\n{text}".encode()).hexdigest()[:16]


def _python_files(root: Path) -> list[Path]:
    """Sources below `root` in sorted order; the standard library's folder does not include site-packages."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            d for d in folders if d != "__pycache__" and not (d == "site-packages" and Path(folder) == root)
        )
        found += [Path(folder) / n for n in sorted(names) if n.endswith(".py")]
    return found


def _scan(files: list[Path]) -> Iterator[tuple[list[str], int]]:
    tasks = [files[i : i + _FILES_PER_TASK] for i in range(0, len(files), _FILES_PER_TASK)]
    workers = min(len(tasks), len(os.sched_getaffinity(0)))
    if workers <= 1:
        yield from map(_scan_files, tasks)
        return
    # Spawned, not forked: the caller may have threads (Ray, torch) that a fork would freeze.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_scan_files, tasks)


def _scan_files(files: list[Path]) -> tuple[list[str], int]:
    sentences: list[str] = []
    unreadable = 0
    for file in files:
        try:
            source = file.read_bytes()
            if b'"""' in source or b"'''" in source:
                sentences += sentences_of(source.decode("utf-8"))
        except (OSError, SyntaxError, ValueError, RecursionError):
            unreadable += 1
    return sentences, unreadable
