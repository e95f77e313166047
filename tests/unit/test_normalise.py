"""Normalisation: what it does to hostile text, that twice is once, and that a model sees what the corpus held."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.source.sources import open_source
from vae_dist.data.text.normalise import keyword_filter, normaliser
from vae_dist.data.text.tokenizer import Tokenizer, build_tokenizer

STRIP = {"strip_punctuation": True, "strip_digits": True}
EVERY = [
    {"unicode_form": form, "lowercase": low, "strip_punctuation": punctuation, "strip_digits": digits}
    for form, low, punctuation, digits in itertools.product(("none", "nfc", "nfkc"), *[(False, True)] * 3)
]


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "  Kept as it\t is.  9 ", "Kept as it\t is.  9"),
        ({"unicode_form": "nfc"}, "cafe\u0301 ﬁ ½", "café ﬁ ½"),
        ({"unicode_form": "nfkc"}, "cafe\u0301 ﬁ ①\u00a0x", "café fi 1 x"),
        ({"lowercase": True}, "ÀB ΟΔΟΣ", "àb οδοσ"),
        ({"strip_punctuation": True}, "It's a dog’s «life», 3 well-known $5!", "Its a dogs life 3 well known 5"),
        ({"strip_punctuation": True}, "' quoted ' rock 'n' roll (…) ¿qué? 、", "quoted rock n roll qué"),
        ({"strip_punctuation": True}, "<unk>, <unk>-<unk> <b> unk> <unk", "<unk> <unk> <unk> b unk unk"),
        ({"strip_punctuation": True, "lowercase": True}, "<UNK>.", "<unk>"),
        ({"strip_digits": True}, "12 dogs, mp3 ٣ x²", "dogs, mp x²"),
        (STRIP, " 1. ", ""),
        (STRIP, "tabs\tand \x1c controls\r\n", "tabs and controls"),
        (STRIP, "emoji 👩🏽‍🚀 stay", "emoji 👩🏽‍🚀 stay"),
    ],
)
def test_what_becomes_of_a_text(options: dict[str, Any], text: str, expected: str) -> None:
    assert normaliser(PrepareConfig(**options))(text) == expected


TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aé\u0301'’.<>unk İΣ9\u1100\u1161\x1c")),
    max_size=30,
)


@pytest.mark.parametrize("options", EVERY, ids=lambda options: "-".join(map(str, options.values())))
@given(text=TEXT)
@settings(max_examples=60, deadline=None)
def test_twice_is_once(options: dict[str, Any], text: str) -> None:
    normalise = normaliser(PrepareConfig(**options))
    assert normalise(normalise(text)) == normalise(text)


RAW = [
    "It's a DOG, cafe\u0301 №5!",
    "Two dogs' beds: 20 cm;  and\ta half.",
    "<UNK> and <unk>.",
    "ﬁne ½ ΟΔΟΣ",
    "don't — 'stop'",
]


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram", "given"])
@pytest.mark.parametrize("options", EVERY[::3] + EVERY[-1:], ids=lambda options: "-".join(map(str, options.values())))
def test_a_raw_text_has_the_ids_of_the_prepared_one(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    path, tokenizer_path = tmp_path / "a.txt", tmp_path / "t.json"
    path.write_text("\n".join(RAW), encoding="utf-8")
    build_tokenizer(RAW, PrepareConfig(tokenizer="bpe", vocab_size=300)).save(tokenizer_path)
    wanted = str(tokenizer_path) if kind == "given" else kind
    prepare = PrepareConfig(tokenizer=wanted, vocab_size=300, **options)
    source = open_source(str(path), prepare, tmp_path)
    prepared = [text for _, text in source.texts()]
    tokenizer = build_tokenizer(prepared, prepare)
    tokenizer.save(tokenizer_path)
    loaded = Tokenizer.load(tokenizer_path)
    assert len(prepared) == len(RAW)
    for raw, text in zip(RAW, prepared, strict=True):
        assert loaded.encode_batch([raw])[0].tolist() == tokenizer.encode_batch([text])[0].tolist()
        if kind != "word":
            assert loaded.decode(loaded.encode_batch([raw])[0]) == text
    # Trained on raw or prepared text, and given once more, it is the same.
    assert build_tokenizer(RAW, prepare).sha256 == tokenizer.sha256 or kind == "given"
    again = prepare.model_copy(update={"tokenizer": str(tokenizer_path)})
    assert build_tokenizer([], again).sha256 == tokenizer.sha256


def test_unk_is_one_token_after_stripping() -> None:
    options = PrepareConfig(tokenizer="word", recipe="coco_captions")
    tokenizer = build_tokenizer(["a dog"], options)
    assert tokenizer.encode_batch(["A <unk>, DOG."])[0].tolist() == [4, 3, 5, 2]


@pytest.mark.parametrize(
    ("keyword", "text", "is_found"),
    [
        ("elephant", "An ELEPHANT.", True),
        ("elephant", "two elephants", False),
        ("Elephant", "the elephant's ear", True),
        ("elephant", "elephant_1", False),
        ("fire hydrant", "a red fire hydrant", True),
        ("c++", "in c++ only", True),
        ("été", "un été", True),
    ],
)
def test_keyword(keyword: str, text: str, is_found: bool) -> None:
    found = keyword_filter(keyword)
    assert found is not None and bool(found(text)) == is_found


def test_keyword_and_empty_texts_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a Dog\n\n!!!\na cat\nthe dog's bed\n42 dog\n", encoding="utf-8")
    source = open_source(str(tmp_path / "a.txt"), PrepareConfig(keyword="dog", **STRIP), tmp_path)
    counts: Counter[str] = Counter()
    assert [text for _, text in source.texts(counts)] == ["a Dog", "the dogs bed", "dog"]
    assert counts == {"empty_texts": 2, "filtered_texts": 1}
    assert keyword_filter(None) is None
