"""Unigram vocabularies (Kudo 2018), trained so that the same words always give the same pieces and scores.

The trainer of the `tokenizers` package walks hash tables in an order that differs from run to run, also with one
thread, and so do its vocabularies. Here everything is an array in a fixed order.

Words are columns sorted by falling length: the words that have a character number i are the first `counts[i]` ones,
and every step below works on such leading slices. A piece number of a place (i, word) and a length n says which piece
is written there, or -1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_LONGEST_PIECE = 16
# The probability of a word stays a normal float64: the least likely characters 32 times in a row are 1e-288.
_LONGEST_WORD = 32
_SMALLEST_PROBABILITY = 1e-9
_MOST_WORDS = 200_000
# Pieces to begin with, as a multiple of the wanted ones; the share kept by each round; EM steps in a round.
_SEEDS_PER_PIECE, _KEPT, _EM_STEPS = 20, 0.75, 2
_DECIMALS = 9


class _Words(NamedTuple):
    """Distinct words, longest first.

    Attributes:
        frequencies: float64, how often each occurs.
        letters: uint8, letters[i] of all words that are longer than i.
        pieces: pieces[n - 1][i]: the piece of n letters from letter i on, of all words with at least i + n letters.
    """

    frequencies: np.ndarray
    letters: list[np.ndarray]
    pieces: list[list[np.ndarray]]


class _Pieces(NamedTuple):
    """Pieces by number, the single letters first.

    Attributes:
        lengths, starts, words: letters of a piece, and one place where it is written.
        counts: float64, how often it is written, then how often it is expected to be used.
    """

    lengths: np.ndarray
    starts: np.ndarray
    words: np.ndarray
    counts: np.ndarray


def train_unigram(
    frequencies: Mapping[str, int], alphabet: list[str], size: int, min_frequency: int
) -> list[tuple[str, float]]:
    """Pieces and their log-probabilities, most likely first: the alphabet, and what describes the words best.

    Args:
        frequencies: words of letters of the alphabet. Of more than 200,000 the most frequent are used; a word of more
            than 32 letters is cut.
        size: most pieces, the alphabet included.
        min_frequency: pieces that are written more rarely are not considered.
    """
    words, pieces = _seed(_columns(frequencies, alphabet), len(alphabet), max(2, min_frequency), size)
    kept = len(pieces.counts)
    while True:
        for _ in range(_EM_STEPS):
            probabilities = _probabilities(pieces.counts, len(alphabet))
            pieces = pieces._replace(counts=_expected_counts(words, probabilities))
        if kept <= size:
            break
        kept = max(size, int(_KEPT * kept))
        words, pieces = _keep(words, pieces, _most_useful(words, pieces, len(alphabet), kept))
    probabilities = _probabilities(pieces.counts, len(alphabet))
    used = np.flatnonzero(probabilities)
    scores = np.round(np.log(probabilities[used]), _DECIMALS).tolist()
    written = [_written(words, pieces, number, alphabet) for number in used.tolist()]
    return sorted(zip(written, scores, strict=True), key=lambda item: (-item[1], item[0]))


def _columns(frequencies: Mapping[str, int], alphabet: list[str]) -> _Words:
    number = {letter: i for i, letter in enumerate(alphabet)}
    ranked = sorted(frequencies.items(), key=lambda item: (-item[1], item[0]))[:_MOST_WORDS]
    parts: dict[str, int] = {}
    for word, frequency in ranked:
        for start in range(0, len(word), _LONGEST_WORD):
            part = word[start : start + _LONGEST_WORD]
            parts[part] = parts.get(part, 0) + frequency
    longest_first = sorted(parts, key=lambda word: (-len(word), word))
    letters = []
    for i in range(len(longest_first[0]) if longest_first else 0):
        column = [number[word[i]] for word in longest_first if len(word) > i]
        letters.append(np.array(column, dtype=np.int64))
    return _Words(np.array([parts[word] for word in longest_first], dtype=np.float64), letters, [])


def _seed(words: _Words, alphabet: int, min_frequency: int, size: int) -> tuple[_Words, _Pieces]:
    """Every part of a word that is frequent enough, found letter by letter; then those that cover most letters."""
    width = len(words.letters)
    zeros = np.zeros(alphabet, dtype=np.int64)
    singles = sum((_tally(ids, words.frequencies, alphabet) for ids in words.letters), np.zeros(alphabet))
    tables, facts = [words.letters], [_Pieces(zeros + 1, zeros, zeros, singles)]
    for length in range(2, min(_LONGEST_PIECE, width) + 1):
        # A frequent piece begins with a frequent piece.
        ends = words.letters[length - 1 :]
        begins = [ids[: len(end)] for ids, end in zip(tables[-1], ends, strict=False)]
        keys = [np.where(ids < 0, -1, ids * alphabet + end) for ids, end in zip(begins, ends, strict=True)]
        numbers, found = _number(keys, words.frequencies, length, min_frequency)
        if not len(found.counts):
            break
        first = sum(len(f.counts) for f in facts)
        tables.append([np.where(ids < 0, -1, ids + first) for ids in numbers])
        facts.append(found)
    pieces = _Pieces(*(np.concatenate(parts) for parts in zip(*facts, strict=True)))
    gain = pieces.counts * pieces.lengths
    gain[:alphabet] = np.inf
    seeds = np.argsort(-gain, kind="stable")[: max(size * _SEEDS_PER_PIECE, alphabet)]
    return _keep(words._replace(pieces=tables), pieces, np.sort(seeds))


def _number(
    keys: list[np.ndarray], frequencies: np.ndarray, length: int, min_frequency: int
) -> tuple[list[np.ndarray], _Pieces]:
    """Numbers from 0 for the keys (-1 is none) whose words are frequent enough, and where each stands first."""
    flat = np.concatenate(keys)
    sizes = [len(part) for part in keys]
    word = np.concatenate([np.arange(size) for size in sizes])
    start = np.repeat(np.arange(len(keys)), sizes)
    distinct, place, which = np.unique(flat, return_index=True, return_inverse=True)
    counts = np.bincount(which, frequencies[word], len(distinct))
    is_kept = (distinct >= 0) & (counts >= min_frequency)
    numbers = np.where(is_kept, np.cumsum(is_kept) - 1, -1)[which]
    place = place[is_kept]
    found = _Pieces(np.full(len(place), length), start[place], word[place], counts[is_kept])
    return np.split(numbers, np.cumsum(sizes)[:-1]), found


def _keep(words: _Words, pieces: _Pieces, kept: np.ndarray) -> tuple[_Words, _Pieces]:
    """Number the pieces `kept`, in rising order, anew."""
    numbers = np.full(len(pieces.counts) + 1, -1, dtype=np.int64)
    numbers[kept] = np.arange(len(kept))
    tables = [[numbers[ids] for ids in table] for table in words.pieces]
    return words._replace(pieces=tables), _Pieces(*(fact[kept] for fact in pieces))


def _probabilities(counts: np.ndarray, alphabet: int) -> np.ndarray:
    """Probabilities of the pieces, and 0 for number -1. Letters are always possible.

    Half a use is taken off a count, which is close to what the digamma function of variational Bayes does, so that
    pieces that are hardly used vanish.
    """
    discounted = np.maximum(counts - 0.5, 0.0)
    probabilities = discounted / max(discounted.sum(), 1.0)
    probabilities[:alphabet] = np.maximum(probabilities[:alphabet], _SMALLEST_PROBABILITY)
    return np.append(probabilities, 0.0)


def _expected_counts(words: _Words, probabilities: np.ndarray) -> np.ndarray:
    """How often each piece is used, over all ways to write the words, weighted by their probability."""
    width = len(words.letters)
    sizes = [len(words.frequencies), *(len(column) for column in words.letters), 0]
    # forward[i]: probability of the first i letters; backward[i]: of the letters from i on; words of i letters or more.
    forward = [np.ones(sizes[0]), *(np.zeros(size) for size in sizes[1:-1])]
    backward = [np.zeros(size) for size in sizes[:-1]]
    for i in range(width):
        for table, stop in zip(words.pieces, range(i + 1, width + 1), strict=False):
            forward[stop] += forward[i][: sizes[stop]] * probabilities[table[i]]
    for i in reversed(range(width + 1)):
        backward[i][sizes[i + 1] :] = 1.0
        for table, stop in zip(words.pieces, range(i + 1, width + 1), strict=False):
            backward[i][: sizes[stop]] += backward[stop] * probabilities[table[i]]
    weights = words.frequencies / backward[0]
    counts = np.zeros(len(probabilities))
    for i in range(width):
        for table, stop in zip(words.pieces, range(i + 1, width + 1), strict=False):
            size = sizes[stop]
            used = weights[:size] * forward[i][:size] * probabilities[table[i]] * backward[stop]
            counts += _tally(table[i], used, len(probabilities))
    # Processors may differ in the last bits of a sum; what is decided by it should not.
    return np.round(counts[:-1], _DECIMALS)


def _most_useful(words: _Words, pieces: _Pieces, alphabet: int, kept: int) -> np.ndarray:
    """The letters, and the pieces whose loss would lower the likelihood of the words most."""
    with np.errstate(divide="ignore"):
        scores = np.log(_probabilities(pieces.counts, alphabet))
    # best[i]: score of the best way to write the first i letters of each piece without the piece itself.
    best = np.full((_LONGEST_PIECE + 1, len(pieces.counts)), -np.inf)
    best[0] = 0.0
    number = np.arange(len(pieces.counts))
    for stop in range(1, len(words.pieces) + 1):
        for start in range(stop):
            reaching = number[pieces.lengths >= stop]
            inner = _piece_at(words, pieces, reaching, start, stop - start)
            score = np.where(inner == reaching, -np.inf, scores[inner])
            best[stop, reaching] = np.maximum(best[stop, reaching], best[start, reaching] + score)
    alternative = best[pieces.lengths, number]
    with np.errstate(invalid="ignore"):
        loss = pieces.counts * (scores[:-1] - alternative)
    loss = np.where(pieces.counts > 0, np.round(loss, 6), -np.inf)
    loss[:alphabet] = np.inf
    return np.sort(np.argsort(-loss, kind="stable")[:kept])


def _piece_at(words: _Words, pieces: _Pieces, numbers: np.ndarray, start: int, length: int) -> np.ndarray:
    """The pieces of `length` letters from letter `start` on of the given pieces."""
    table = words.pieces[length - 1]
    inner = np.full(len(numbers), -1, dtype=np.int64)
    column = pieces.starts[numbers] + start
    for i in np.unique(column):
        here = column == i
        inner[here] = table[i][pieces.words[numbers[here]]]
    return inner


def _written(words: _Words, pieces: _Pieces, number: int, alphabet: list[str]) -> str:
    if number < len(alphabet):
        return alphabet[number]
    start, word = int(pieces.starts[number]), int(pieces.words[number])
    return "".join(alphabet[words.letters[i][word]] for i in range(start, start + int(pieces.lengths[number])))


def _tally(numbers: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """Sum of weights of each number; -1 counts as the last one."""
    return np.bincount(np.where(numbers < 0, size - 1, numbers), weights[: len(numbers)], size)
