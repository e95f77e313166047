"""Keys by which nearly equal texts find each other: MinHash over word 3-shingles, in bands.

The resemblance of two texts is the Jaccard index J of their sets of three neighbouring words (A. Broder, "On the
resemblance and containment of documents", 1997). The smallest value of a random hash function over a set is the same
for two sets with probability J. A key is made of 8 such smallest values, and a text has 8 keys; two texts share a key
with probability 1 - (1 - J^8)^8: 3 % at J = 0.5, 38 % at 0.7, 77 % at 0.8, 99 % at 0.9.

Words are runs of letters and digits, in lower case, so punctuation does not tell texts apart. A text of fewer than
three words is one shingle; one without any is compared as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import xxhash

KEYS_PER_TEXT = 8
VALUES_PER_KEY = 8
_SHINGLE_WORDS = 3
_WORDS = re.compile(r"\w+")
_HASHES = KEYS_PER_TEXT * VALUES_PER_KEY
_GOLDEN = 0x9E3779B97F4A7C15


def near_keys(texts: Sequence[str]) -> np.ndarray:
    """uint64[n, KEYS_PER_TEXT, 2]: the 128-bit keys of every text; n is at least 1."""
    signatures = _signatures([_shingles(text) for text in texts])
    bands = signatures.astype("<u8").reshape(len(texts), KEYS_PER_TEXT, VALUES_PER_KEY)
    # The number of the band is part of the key: equal values of different bands mean nothing.
    digests = b"".join(
        xxhash.xxh3_128_digest(band.tobytes(), seed=number) for row in bands for number, band in enumerate(row)
    )
    return np.frombuffer(digests, dtype=">u8").reshape(len(texts), KEYS_PER_TEXT, 2)


def _shingles(text: str) -> np.ndarray:
    """uint64, not empty: a hash of every shingle."""
    words = _WORDS.findall(text.lower())
    if len(words) < _SHINGLE_WORDS:
        return np.array([xxhash.xxh3_64_intdigest(" ".join(words or [text]).encode())], dtype=np.uint64)
    hashes = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in words], dtype=np.uint64)
    combined = _mixed(hashes[:-2])
    combined = _mixed(combined + hashes[1:-1])
    return _mixed(combined + hashes[2:])


def _signatures(shingles: Sequence[np.ndarray]) -> np.ndarray:
    """uint64[n, _HASHES]: for each text the smallest value of each hash function over its shingles."""
    flat = np.concatenate(shingles)
    starts = np.concatenate([[0], np.cumsum([len(s) for s in shingles])[:-1]])
    multipliers, offsets = _FUNCTIONS
    smallest = np.empty((len(shingles), _HASHES), dtype=np.uint64)
    for number in range(_HASHES):
        values = flat * multipliers[number] + offsets[number]
        smallest[:, number] = np.minimum.reduceat(values, starts)
    return smallest


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of the result depends on every bit of the argument."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _functions() -> tuple[np.ndarray, np.ndarray]:
    """The hash functions, h(x) = a x + b mod 2^64 with odd a; fixed for ever."""
    drawn = _mixed(np.arange(2 * _HASHES, dtype=np.uint64) * np.uint64(_GOLDEN))
    return drawn[:_HASHES] | np.uint64(1), drawn[_HASHES:]


_FUNCTIONS = _functions()
