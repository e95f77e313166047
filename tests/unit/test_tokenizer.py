"""Tokenizers: ids against counts made by hand, round trips of hostile text, and files that are refused."""

import functools
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.text.tokenizer import Tokenizer, build_tokenizer, lowercase
from vae_dist.errors import DataError

WORDS = ["b b a", "a <unk> c", "c d <pad> </s>", "<s> B"]
NASTY = [
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇪",
    "שלום עולם, مرحبا بالعالم \u200f right to left",
    "e\u0301 vs é, Z̷͚̈́a̸lgo, à\u0300\u0301\u0302",
    "nul\0inside\x01\x7f",
    "line\r\nbreak\ttab \u2028 \u00a0 no-break  two spaces ",
    "</s> <s> <pad> <unk> <unk>x",
    "",
    " ",
    "\ud7ff\ue000\ufffd\U0010ffff",
    "x" * 200_000,
    "word " * 40_000,
    "永和九年,歲在癸丑" * 50,
]


def word(**options: Any) -> PrepareConfig:
    """Options of a word-level data set, whatever the defaults are."""
    return PrepareConfig(**{"tokenizer": "word", "vocab_size": 10_000, "max_tokens": 128, **options})


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def byte_level(request: pytest.FixtureRequest) -> Tokenizer:
    return build_tokenizer(["the cat sat on the mat", "the café"] * 20, word(tokenizer=request.param, vocab_size=300))


def word_vocabulary(tokenizer: Tokenizer) -> list[str]:
    vocabulary = json.loads(tokenizer._bytes)["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    return sorted(vocabulary, key=vocabulary.__getitem__)


def test_word_vocabulary_is_sorted_by_count_then_word() -> None:
    tokenizer = build_tokenizer(WORDS, word())
    assert word_vocabulary(tokenizer) == ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "B", "d"]
    assert tokenizer.vocab_size == 9
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)


def test_word_ids() -> None:
    tokenizer = build_tokenizer(WORDS, word())
    encoded = tokenizer.encode_batch(["b d", "", "new <unk> a", "a </s> <pad> <s> b"])
    # Special tokens that a text spells out are unknown words: an end of sequence is at the end only.
    assert [ids.tolist() for ids in encoded] == [[5, 8, 2], [2], [3, 3, 4, 2], [4, 3, 3, 3, 5, 2]]
    assert all(ids.dtype == np.int64 for ids in encoded)


def test_word_limits() -> None:
    assert word_vocabulary(build_tokenizer(WORDS, word(min_frequency=2)))[4:] == ["a", "b", "c"]
    many = [" ".join(f"w{i:02}" for i in range(n)) for n in range(30)]
    assert word_vocabulary(build_tokenizer(many, word(vocab_size=8)))[4:] == ["w00", "w01", "w02", "w03"]


def test_words_split_punctuation_off_and_decoding_puts_it_back() -> None:
    text = "Wait, (he said) it's <unk>: don't [go]!"
    tokenizer = build_tokenizer([text], word(pre_tokenizer="words"))
    assert "Wait" in word_vocabulary(tokenizer)
    assert tokenizer.encode_batch([text])[0].tolist().count(3) == 1
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_decode_stops_at_the_end_and_drops_padding() -> None:
    tokenizer = build_tokenizer(WORDS, word())
    assert tokenizer.decode([1, 4, 0, 3, 5, 2, 6, 6]) == "a <unk> b"
    assert tokenizer.decode(np.array([4, 5], dtype=np.uint16)) == "a b"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_byte_level_round_trips(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode_batch([text])[0]
    assert ids[-1] == 2
    assert (ids[:-1] > 3).all()
    assert byte_level.decode(ids) == text


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
@settings(max_examples=200)
def test_byte_level_round_trips_any_text(byte_level: Tokenizer, texts: list[str]) -> None:
    assert [byte_level.decode(ids) for ids in byte_level.encode_batch(texts)] == texts


@pytest.mark.long
def test_a_line_of_ten_megabytes(byte_level: Tokenizer) -> None:
    """One word of that length takes linear time; merging or searching it in quadratic time would take hours."""
    text = "the永" * 1_666_666
    started = time.monotonic()
    ids, lengths = byte_level.encode_flat([text])
    assert time.monotonic() - started < 60
    assert lengths.tolist() == [len(ids)]
    assert byte_level.decode(ids) == text


def test_common_words_are_one_token(byte_level: Tokenizer) -> None:
    assert byte_level.vocab_size <= 300
    assert len(byte_level.encode_batch(["the cat sat on the mat"])[0]) == 7


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_smallest_byte_level_vocabulary(kind: str) -> None:
    with pytest.raises(DataError, match="need 260"):
        build_tokenizer(["a"], word(tokenizer=kind, vocab_size=259))
    for texts in (["a"], []):
        tokenizer = build_tokenizer(texts, word(tokenizer=kind, vocab_size=260))
        assert tokenizer.vocab_size == 260
        assert tokenizer.decode(tokenizer.encode_batch(["é\0 a"])[0]) == "é\0 a"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_no_text_is_read_as_a_special_token(kind: str) -> None:
    texts = ["<unk> </s> <s> <pad>", "</s></s>x<unk>", "a<s>b"]
    tokenizer = build_tokenizer(texts * 50, word(tokenizer=kind, vocab_size=400))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert (ids[:-1] > 3).all() and tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_word_level_on_hostile_text(text: str) -> None:
    """Words between white space, unknown ones as <unk>; a special token is none but <unk>."""
    tokenizer = build_tokenizer(WORDS, word())
    known = {"a": 4, "b": 5, "c": 6, "B": 7, "d": 8}
    ids, lengths = tokenizer.encode_flat([text, f"a {text} d"])
    words = re.split(r"\s+", text.strip()) if text.strip() else []
    expected = [known.get(w, 3) for w in words]
    assert ids.tolist() == [*expected, 2, 4, *expected, 8, 2]
    assert lengths.tolist() == [len(words) + 1, len(words) + 3]


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram"])
@given(texts=st.lists(st.text(st.sampled_from("ab <unk></s>é\0"), max_size=12), max_size=6))
@settings(max_examples=100, deadline=None)
def test_flat_ids_are_those_of_every_text_alone(kind: str, texts: list[str]) -> None:
    tokenizer = _trained(kind)
    ids, lengths = tokenizer.encode_flat(texts)
    assert (ids.dtype, lengths.dtype) == (np.uint32, np.int64)
    alone = [[max(i, 3) for i in tokenizer._inner.encode(text, add_special_tokens=False).ids] + [2] for text in texts]
    assert lengths.tolist() == [len(one) for one in alone]
    assert ids.tolist() == [i for one in alone for i in one]
    assert [one.tolist() for one in tokenizer.encode_batch(texts)] == alone


@functools.cache
def _trained(kind: str) -> Tokenizer:
    return build_tokenizer(["a b <unk> ab ab é"] * 5, word(tokenizer=kind, vocab_size=270))


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram"])
def test_training_is_deterministic(kind: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdé \U0001f600", k=40)) for _ in range(500)]
    options = word(tokenizer=kind, vocab_size=400)
    first, second = (build_tokenizer(iter(texts), options) for _ in range(2))
    first.save(tmp_path / "a.json")
    second.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    # Counts decide, not the order of the texts.
    assert build_tokenizer(texts[::-1], options).sha256 == first.sha256


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram"])
@pytest.mark.parametrize("pre_tokenizer", ["whitespace", "words"])
def test_save_and_load(kind: str, pre_tokenizer: str, tmp_path: Path) -> None:
    options = word(tokenizer=kind, pre_tokenizer=pre_tokenizer, lowercase=True)
    tokenizer = build_tokenizer(["The cat, the CAT </s>!"], options)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.sha256 == tokenizer.sha256
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    text = "THE cat </s>, x"
    ids = tokenizer.encode_batch([text])[0]
    assert loaded.encode_batch([text])[0].tolist() == ids.tolist()
    assert loaded.decode(ids) == tokenizer.decode(ids)


def test_lowercase_belongs_to_the_tokenizer() -> None:
    tokenizer = build_tokenizer(["The CAT", "the ΟΔΟΣ"], word(lowercase=True))
    assert sorted(word_vocabulary(tokenizer)[4:]) == sorted(["the", "cat", lowercase("ΟΔΟΣ")])
    assert tokenizer.encode_batch(["THE οδοσ"])[0].tolist()[0] == 4
    assert 3 not in tokenizer.encode_batch(["THE ΟΔΟΣ"])[0]


def test_a_given_tokenizer_is_lower_cased_on_request(tmp_path: Path) -> None:
    build_tokenizer(["the cat"], word()).save(tmp_path / "t.json")
    given = word(tokenizer=str(tmp_path / "t.json"))
    plain, lower = (build_tokenizer([], given.model_copy(update={"lowercase": low})) for low in (False, True))
    assert plain.sha256 == Tokenizer.load(tmp_path / "t.json").sha256 != lower.sha256
    assert plain.encode_batch(["The CAT"])[0].tolist() == [3, 3, 2]
    assert lower.encode_batch(["The CAT"])[0].tolist() == [5, 4, 2]
    lower.save(tmp_path / "t.json")
    assert build_tokenizer([], given.model_copy(update={"lowercase": True})).sha256 == lower.sha256


def test_lower_casing_keeps_the_normalizer_of_a_given_tokenizer(tmp_path: Path) -> None:
    build_tokenizer(["the \u00e9"], word()).save(tmp_path / "t.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    inner.normalizer = normalizers.NFC()
    inner.save(str(tmp_path / "t.json"))
    options = word(tokenizer=str(tmp_path / "t.json"), lowercase=True)
    lower = build_tokenizer([], options)
    assert 3 not in lower.encode_batch(["THE E\u0301"])[0]
    lower.save(tmp_path / "t.json")
    assert build_tokenizer([], options).sha256 == lower.sha256


def test_what_a_file_says_about_truncation_and_padding_is_ignored(tmp_path: Path) -> None:
    build_tokenizer(["a b c"], word()).save(tmp_path / "t.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    inner.enable_truncation(2)
    inner.enable_padding(length=5)
    inner.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(tmp_path / "t.json").encode_batch(["a b c"])[0].tolist() == [4, 5, 6, 2]


def test_vocabulary_with_gaps_counts_to_the_largest_id(tmp_path: Path) -> None:
    ids = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "far": 70_000}
    inner = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.normalizer = normalizers.NFC()
    inner.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(tmp_path / "t.json").vocab_size == 70_001


def test_refused_files(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(DataError, match=f"no tokenizer {path}"):
        Tokenizer.load(path)
    for content in (b"{}", b"\xff\xfe", b"not json"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a Hugging Face tokenizer file"):
            Tokenizer.load(path)
    tokenizers.Tokenizer(models.WordLevel({"<pad>": 1, "<s>": 0, "x": 2}, unk_token="x")).save(str(path))
    with pytest.raises(DataError, match=r"at \[1, 0, None, None\]"):
        build_tokenizer([], word(tokenizer=str(path)))
