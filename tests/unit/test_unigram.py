"""Unigram training against the definition: likelihoods by enumeration, and the same bytes from run to run."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vae_dist.data.text import unigram as module
from vae_dist.data.text.unigram import train_unigram

ROOT = Path(__file__).parents[2]
ALPHABET = ["a", "b", "c"]


def ways(word: str, known: set[str]) -> list[list[str]]:
    """Every way to write a word with known pieces."""
    if not word:
        return [[]]
    return [[word[:n], *rest] for n in range(1, len(word) + 1) if word[:n] in known for rest in ways(word[n:], known)]


def words(count: int, seed: int = 0) -> dict[str, int]:
    draw = random.Random(seed)
    return {"".join(draw.choices(ALPHABET, k=draw.randint(1, 7))): draw.randint(1, 9) for _ in range(count)}


def test_expected_counts_are_those_of_all_ways_to_write_the_words() -> None:
    given = words(40)
    columns, pieces = module._seed(module._columns(given, ALPHABET), 3, 2, 30)
    names = [module._written(columns, pieces, i, ALPHABET) for i in range(len(pieces.counts))]
    assert len(set(names)) == len(names) > 20
    probabilities = module._probabilities(pieces.counts, 3)
    of = dict(zip(names, probabilities, strict=False))
    expected = dict.fromkeys(names, 0.0)
    for word, frequency in given.items():
        scored = [(way, math.prod(of[piece] for piece in way)) for way in ways(word, set(names))]
        total = sum(probability for _, probability in scored)
        for way, probability in scored:
            for piece in way:
                expected[piece] += frequency * probability / total
    found = module._expected_counts(columns, probabilities)
    np.testing.assert_allclose(found, [expected[name] for name in names], atol=2e-9)


def test_seeds_are_counted() -> None:
    given = {"abab": 3, "ba": 2, "c": 1}
    columns, pieces = module._seed(module._columns(given, ALPHABET), 3, 2, 30)
    names = [module._written(columns, pieces, i, ALPHABET) for i in range(len(pieces.counts))]
    found = dict(zip(names, pieces.counts.tolist(), strict=True))
    assert found == {"a": 8, "b": 8, "c": 1, "ab": 6, "ba": 5, "aba": 3, "bab": 3, "abab": 3}


def test_the_pieces_of_the_words_are_found() -> None:
    parts = ["aab", "cc", "bca"]
    given = {"".join(p): 5 for n in (1, 2, 3) for p in itertools.product(parts, repeat=n)}
    found = train_unigram(given, ALPHABET, 6, 1)
    assert {piece for piece, _ in found} == {*ALPHABET, *parts}
    assert {piece for piece, _ in found[:3]} == set(parts)
    assert sum(math.exp(score) for _, score in found) == pytest.approx(1.0, abs=1e-6)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_bounds() -> None:
    found = dict(train_unigram(words(300), ALPHABET, 50, 4))
    assert len(found) <= 50 and set(ALPHABET) <= set(found)
    assert set(dict(train_unigram({}, ALPHABET, 10, 1))) == set(ALPHABET)
    assert set(dict(train_unigram({"abab": 1}, ALPHABET, 3, 1))) == set(ALPHABET)
    # A word that is written once and is very long neither overflows nor underflows.
    long = dict(train_unigram({"c" * 100_000: 1, "ab": 10_000_000}, ALPHABET, 20, 1))
    assert all(math.isfinite(score) for score in long.values())


def test_the_order_of_the_words_does_not_matter() -> None:
    given = words(400)
    shuffled = dict(sorted(given.items(), key=lambda item: hash(item)))
    assert train_unigram(given, ALPHABET, 60, 1) == train_unigram(shuffled, ALPHABET, 60, 1)


def test_the_same_bytes_from_every_process_and_number_of_threads() -> None:
    script = (
        "import random\nfrom vae_dist.config.schema import PrepareConfig\n"
        "from vae_dist.data.text.tokenizer import build_tokenizer\n"
        "draw = random.Random(0)\n"
        "words = [''.join(draw.choices('abcdé', k=draw.randint(1, 9))) for _ in range(4000)]\n"
        "texts = [' '.join(words[i : i + 9]) for i in range(0, 4000, 9)]\n"
        "for kind in ('unigram', 'bpe'):\n"
        "    print(build_tokenizer(texts, PrepareConfig(tokenizer=kind, vocab_size=500)).sha256)\n"
    )
    found = set()
    for threads, parallel, seed in (("1", "false", "1"), ("4", "true", "2")):
        settings = {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": parallel}
        environment = {**os.environ, **settings, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, timeout=120)
        found.add(done.stdout)
    assert len(found) == 1 and found.pop().count(b"\n") == 2
