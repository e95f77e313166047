"""Embeddings that start from published word vectors: files of GloVe (Pennington et al. 2014), word2vec and fastText.

Shapes: V vocabulary, E embedding.

A line is a word and its numbers with single spaces between; a first line of two whole numbers (words and dimensions) is
word2vec's header. Files of several GB are read line by line, and numbers are only read for words of the vocabulary.
"""

from __future__ import annotations

import gzip
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vae_dist.data.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from vae_dist.errors import ConfigError, DataError

_NOTHING, _LOWER_CASE, _EXACT = 0, 1, 2


@dataclass(frozen=True)
class Coverage:
    """How much of a vocabulary a file has vectors for.

    Attributes:
        words: rows of the vocabulary that stand for a text, which special tokens and pieces of a character do not.
        found: rows that got a vector.
        lower_case: those of them that got the vector of their lower-case form, having none themselves.
    """

    words: int
    found: int
    lower_case: int

    @property
    def share(self) -> float:
        """found / words."""
        return self.found / self.words

    def __str__(self) -> str:
        return (
            f"vectors for {self.found:,} of {self.words:,} words ({self.share:.1%}), {self.lower_case:,} of them as "
            "lower case"
        )


@torch.no_grad()
def initialise(embedding_VE: torch.Tensor, path: str | Path, tokenizer: Tokenizer) -> Coverage:
    """Write the vectors of a file into the rows of its words, in place.

    A word without a vector takes that of its lower-case form; where a file has a word twice the first counts. Vectors
    are kept as they are. The other rows, those of special tokens among them, keep their direction and are scaled by one
    factor to the root mean square of the vectors: GloVe's are five times as long as our random rows, and words
    without a vector would else hardly be heard.

    Args:
        embedding_VE: float32, random rows; a piece of a subword vocabulary is matched by its text, without spaces.
        path: text, or gzip if its name ends in .gz.
        tokenizer: names the rows.

    Raises:
        ConfigError: the vectors are not of E dimensions.
        DataError: the file is missing, damaged, has a malformed line or no word of the vocabulary.
    """
    exact, lower_case = _rows_by_word(tokenizer)
    got_V = np.full(embedding_VE.shape[0], _NOTHING, dtype=np.int8)
    for number, word, numbers in _lines(Path(path), embedding_VE.shape[1]):
        for rows, rank in ((exact.get(word), _EXACT), (lower_case.get(word), _LOWER_CASE)):
            new = [row for row in rows or () if got_V[row] < rank]
            if new:
                embedding_VE[new] = torch.from_numpy(_vector(numbers, Path(path), number)).to(embedding_VE)
                got_V[new] = rank
    has_vector_V = torch.from_numpy(got_V != _NOTHING).to(embedding_VE.device)
    if not has_vector_V.any():
        raise DataError(f"{path} has no vector for any word of the vocabulary. Is it of another language, or encoding?")
    match_scale(embedding_VE, has_vector_V)
    words = sum(len(rows) for rows in exact.values())
    return Coverage(words, int(has_vector_V.sum()), int((got_V == _LOWER_CASE).sum()))


def _rows_by_word(tokenizer: Tokenizer) -> tuple[dict[bytes, list[int]], dict[bytes, list[int]]]:
    """Rows by their word and by its lower-case form where that differs, in UTF-8; without the special tokens."""
    exact: dict[bytes, list[int]] = defaultdict(list)
    lower_case: dict[bytes, list[int]] = defaultdict(list)
    for row in range(len(SPECIAL_TOKENS), tokenizer.vocab_size):
        word = tokenizer.decode([row]).strip(" ")
        # An id that no word has is shown as <unk>, and files have a vector of that name; bytes that are no character by
        # themselves are shown as U+FFFD.
        if not word or word in SPECIAL_TOKENS or "\ufffd" in word:
            continue
        exact[word.encode()].append(row)
        if word.lower() != word:
            lower_case[word.lower().encode()].append(row)
    return exact, lower_case


def _lines(path: Path, embedding_dim: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Number, word and the text of E numbers of every line."""
    if not path.is_file():
        raise DataError(f"There is no file of word vectors {path}. Mend model.embedding_vectors, or leave it out.")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            word, _, numbers = file.readline().rstrip().partition(b" ")
            has_header = word.isdigit() and numbers.isdigit()
            dimensions = int(numbers) if has_header else len(_vector(numbers, path, 1))
            if dimensions != embedding_dim:
                raise ConfigError(
                    f"model.embedding_dim = {embedding_dim}, but the vectors of {path} have {dimensions} dimensions. "
                    f"Set model.embedding_dim={dimensions}, or give a file with {embedding_dim}."
                )
            if not has_header:
                yield 1, word, numbers
            for number, line in enumerate(file, start=2):
                text = line.rstrip()
                if text.count(b" ") == dimensions:
                    word, _, numbers = text.partition(b" ")
                    yield number, word, numbers
                elif not _is_phrase(text, dimensions):
                    raise _malformed(path, number, f"{text.count(b' ')} numbers, not {dimensions}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}. Fetch it again.") from None


def _is_phrase(text: bytes, dimensions: int) -> bool:
    """Whether a line is right but for spaces in its word, as in some of GloVe 840B; no word of ours has spaces."""
    phrase, *numbers = text.rsplit(b" ", dimensions)
    try:
        float(phrase.rpartition(b" ")[2])
    except ValueError:
        return len(numbers) == dimensions
    return False


def _vector(numbers: bytes, path: Path, line: int) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):
            vector = np.array([float(number) for number in numbers.split(b" ")], dtype=np.float32)
    except ValueError as error:
        raise _malformed(path, line, str(error)) from None
    if not np.isfinite(vector).all():
        raise _malformed(path, line, "a number that is not finite")
    return vector


def _malformed(path: Path, line: int, what: str) -> DataError:
    return DataError(
        f"Line {line} of {path} is no word with its vector: {what}. Expected is GloVe's text format, "
        "`word 0.1 -0.2 ...`, as many numbers in every line; delete the line, or fetch the file again."
    )


def match_scale(embedding_VE: torch.Tensor, has_vector_V: torch.Tensor) -> None:
    """Scale the rows without a vector, in place, to the root mean square of those with one."""
    others_VE = embedding_VE[~has_vector_V]
    rms = embedding_VE[has_vector_V].square().mean().sqrt()
    factor = rms / others_VE.square().mean().sqrt()
    # Rows that are all zero have no direction.
    embedding_VE[~has_vector_V] = others_VE * torch.where(factor.isfinite(), factor, 1.0)
