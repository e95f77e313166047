"""Embeddings from published vectors: which row gets which vector, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import shared_corpus

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.text.tokenizer import Tokenizer, build_tokenizer
from vae_dist.errors import ConfigError, DataError
from vae_dist.model.embedding_vectors import initialise

WORDS = ("The", "the", "Paris", "sea", "Ærø", "boat")
FIRST_WORD = 4


def word_tokenizer(words: tuple[str, ...] = WORDS) -> Tokenizer:
    """Ids of the words from 4 on, in their order."""
    # Earlier words occur more often, and so get smaller ids.
    texts = [" ".join([word] * (len(words) - i)) for i, word in enumerate(words)]
    return build_tokenizer(texts, PrepareConfig(tokenizer="word", pre_tokenizer="whitespace", min_frequency=1))


def random_rows(tokenizer: Tokenizer, dim: int = 3) -> torch.Tensor:
    return torch.randn(tokenizer.vocab_size, dim, generator=torch.Generator().manual_seed(0))


def write(folder: Path, text: str, name: str = "vectors.txt") -> Path:
    path = folder / name
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


FILE = "the 1 2 3\nsea 4 -5e-1 6\nparis 7 8 9\nÆrø 1 1 -1\nelsewhere 0 0 0\nsea 9 9 9\n"


@pytest.mark.parametrize("name", ["vectors.txt", "vectors.txt.gz"])
@pytest.mark.parametrize("header", ["", "6 3\n"], ids=["glove", "word2vec"])
def test_each_word_gets_its_vector_or_that_of_its_lower_case(tmp_path: Path, header: str, name: str) -> None:
    tokenizer = word_tokenizer()
    rows = random_rows(tokenizer)
    coverage = initialise(rows, write(tmp_path, header + FILE, name), tokenizer)
    expected = torch.tensor([[1.0, 2, 3], [1, 2, 3], [7, 8, 9], [4, -0.5, 6], [1, 1, -1]])
    assert torch.equal(rows[FIRST_WORD : FIRST_WORD + 5], expected)
    assert (coverage.words, coverage.found, coverage.lower_case) == (6, 5, 2)
    assert coverage.share == 5 / 6
    assert "5 of 6 words (83.3%)" in str(coverage)


@pytest.mark.parametrize("order", ["exact first", "lower case first"])
def test_a_words_own_vector_goes_before_that_of_its_lower_case(tmp_path: Path, order: str) -> None:
    lines = ["The 1 0 0", "the 0 1 0", "The 5 5 5", "the 6 6 6"]
    if order == "lower case first":
        lines[:2] = lines[1::-1]
    tokenizer = word_tokenizer(("The", "the"))
    rows = random_rows(tokenizer)
    coverage = initialise(rows, write(tmp_path, "\n".join(lines)), tokenizer)
    assert rows[FIRST_WORD:].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert coverage.lower_case == 0


def test_rows_without_a_vector_keep_their_direction_at_the_vectors_scale(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    before = random_rows(tokenizer)
    after = before.clone()
    # The file's <unk> and </s> are words of other tokenizers, not our special tokens.
    initialise(after, write(tmp_path, FILE + "<unk> 50 50 50\n</s> 60 60 60\n"), tokenizer)
    others = [0, 1, 2, 3, FIRST_WORD + 5]
    factor = after[others].double() / before[others].double()
    torch.testing.assert_close(factor, factor[:1, :1].expand_as(factor), atol=0, rtol=1e-6)
    found = after[FIRST_WORD : FIRST_WORD + 5].double()
    rms = after[others].double().square().mean().sqrt()
    torch.testing.assert_close(rms, found.square().mean().sqrt(), atol=0, rtol=1e-6)


def test_a_vocabulary_that_is_all_found_and_rows_of_zeros_stay_finite(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(("the",))
    rows = torch.zeros(tokenizer.vocab_size, 3)
    assert initialise(rows, write(tmp_path, FILE), tokenizer).share == 1.0
    assert rows.tolist() == [[0.0] * 3] * 4 + [[1, 2, 3]]


def test_pieces_of_a_subword_vocabulary_are_matched_by_their_text(tmp_path: Path) -> None:
    texts = ["the boat the boat the boat", "a boat on the sea"] * 5
    tokenizer = build_tokenizer(texts, PrepareConfig(tokenizer="bpe", vocab_size=300))
    rows = random_rows(tokenizer)
    coverage = initialise(rows, write(tmp_path, "boat 1 2 3\nthe 4 5 6\n"), tokenizer)
    (ids,) = tokenizer.encode_batch(["the boat the boat"])
    expected = {"the": [4.0, 5, 6], "boat": [1.0, 2, 3]}
    assert [rows[i].tolist() for i in ids[:-1]] == [expected[w] for w in ("the", "boat", "the", "boat")]
    # "the" begins a text, " the" stands inside one.
    assert coverage.found >= 3


def test_an_id_that_no_word_has_is_not_taken_for_the_unknown_word(tmp_path: Path) -> None:
    word_tokenizer().save(tmp_path / "tokenizer.json")
    facts = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    facts["model"]["vocab"]["boat"] = 20
    tokenizer = Tokenizer(json.dumps(facts).encode())
    before = random_rows(tokenizer)
    after = before.clone()
    coverage = initialise(after, write(tmp_path, "<unk> 9 9 9\nboat 1 2 3\n"), tokenizer)
    assert (coverage.words, coverage.found) == (6, 1)
    assert after[20].tolist() == [1, 2, 3]
    torch.testing.assert_close(F.normalize(after[:20]), F.normalize(before[:20]))


def test_words_with_spaces_are_passed_over(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    rows = random_rows(tokenizer)
    initialise(rows, write(tmp_path, "sea 1 2 3\n. . . 7 8 9\nat boat 7 8 9\nboat 4 5 6\n"), tokenizer)
    assert rows[FIRST_WORD + 3].tolist() == [1, 2, 3]
    assert rows[FIRST_WORD + 5].tolist() == [4, 5, 6]


def test_another_dimension_is_a_wrong_configuration(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    for text in (FILE, "6 3\n" + FILE):
        path = write(tmp_path, text)
        with pytest.raises(ConfigError, match=r"model\.embedding_dim = 256.* have 3 dimensions") as raised:
            initialise(random_rows(tokenizer, 256), path, tokenizer)
        assert "Set model.embedding_dim=3" in raised.value.message
        assert str(path) in raised.value.message


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("sea 1 2 3\nboat 1 2\n", 2, "2 numbers, not 3"),
        ("sea 1 2 3\nboat 1 2 3 4\n", 2, "4 numbers, not 3"),
        ("sea 1 2 3\n\nboat 1 2 3\n", 2, "0 numbers, not 3"),
        ("2 3\nsea 1 2 3\nboat 1 2\n", 3, "2 numbers, not 3"),
        ("elsewhere 1 2 3\nboat 1 x 3\n", 2, "'x'"),
        ("elsewhere 1 2 3\nboat 1 nan 3\n", 2, "not finite"),
        ("elsewhere 1 2 3\nboat 1 2 1e39\n", 2, "not finite"),
        ("all the words of a sentence\n", 1, "'the'"),
        ("", 1, "''"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, text: str, line: int, what: str) -> None:
    tokenizer = word_tokenizer()
    path = write(tmp_path, text)
    with pytest.raises(DataError) as raised:
        initialise(random_rows(tokenizer), path, tokenizer)
    assert f"Line {line} of {path}" in raised.value.message
    assert what in raised.value.message
    assert "delete the line" in raised.value.message


def test_files_that_are_missing_damaged_or_of_other_words_are_refused(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(DataError, match=r"There is no file of word vectors .*nowhere"):
        initialise(random_rows(tokenizer), tmp_path / "nowhere.txt", tokenizer)
    whole = write(tmp_path, FILE, "whole.txt.gz").read_bytes()
    for name, data in {"cut": whole[:-12], "plain": FILE.encode(), "flipped": whole[:12] + b"\xff" * 20}.items():
        (tmp_path / f"{name}.gz").write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}\.gz is a damaged gzip file"):
            initialise(random_rows(tokenizer), tmp_path / f"{name}.gz", tokenizer)
    with pytest.raises(DataError, match="no vector for any word of the vocabulary"):
        initialise(random_rows(tokenizer), write(tmp_path, "mer 1 2 3\n"), tokenizer)


def test_a_large_file_is_never_held_in_memory(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    path = tmp_path / "large.txt"
    numbers = " ".join(["0.123456"] * 100)
    path.write_text("".join(f"word{i} {numbers}\n" for i in range(20_000)) + f"sea {numbers}\n", encoding="utf-8")
    tracemalloc.start()
    try:
        initialise(random_rows(tokenizer, 100), path, tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 50


def test_the_vectors_of_glove_cover_ptb() -> None:
    path = shared_corpus("glove") / "glove.6B.50d.subset.txt.gz"
    texts = (shared_corpus("ptb") / "valid.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = build_tokenizer(texts, PrepareConfig(tokenizer="word", pre_tokenizer="whitespace", vocab_size=10_002))
    rows = random_rows(tokenizer, 50) * 50**-0.5
    coverage = initialise(rows, path, tokenizer)
    table = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            word, *numbers = line.split()
            table[word] = np.array(numbers, dtype=np.float32)
    words = [tokenizer.decode([row]) for row in range(FIRST_WORD, tokenizer.vocab_size)]
    has = [word in table or word.lower() in table for word in words]
    assert (coverage.words, coverage.found) == (len(words), sum(has))
    # PTB is in lower case but for N, its number.
    assert coverage.lower_case == 1
    assert coverage.share > 0.97
    expected = np.stack([table.get(w, table.get(w.lower())) for w, h in zip(words, has, strict=True) if h])
    np.testing.assert_array_equal(rows[FIRST_WORD:].numpy()[has], expected)
    unit = F.normalize(rows)
    nearest = unit @ unit[FIRST_WORD + words.index("monday")]
    days = {"monday", "tuesday", "wednesday", "thursday", "friday"}
    assert {tokenizer.decode([int(i)]) for i in nearest.topk(5).indices} == days
