"""Recipes: what a preset sets and what wins over it, WikiText's records, and the real corpora by independent counts."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import shared_corpus

from vae_dist.cli import main
from vae_dist.config.load import dump_yaml, load_config, validate_section
from vae_dist.config.recipes import RECIPES
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.source.sources import open_source
from vae_dist.data.source.wikitext import heading_level, sentences
from vae_dist.errors import ConfigError


@pytest.fixture
def real(request: pytest.FixtureRequest) -> Path:
    """The corpus that a test is parametrised with, where this machine has it."""
    return shared_corpus(request.param)


def texts(path: Path, counts: Counter[str] | None = None, **options: Any) -> list[str]:
    return [text for _, text in open_source(str(path), PrepareConfig(**options), path.parent).texts(counts)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fills_in_and_what_is_written_wins(recipe: str, tmp_path: Path) -> None:
    plain = PrepareConfig(recipe=recipe)
    changed = {name for name in PrepareConfig.model_fields if getattr(plain, name) != getattr(PrepareConfig(), name)}
    assert {name: getattr(plain, name) for name in RECIPES[recipe]} == RECIPES[recipe]
    assert changed <= {"recipe", *RECIPES[recipe]} and plain.tokenizer == "word"
    # Also where what is written is the default of a field.
    written = {"tokenizer": "bpe", "max_tokens": 64, "vocab_size": 2048}
    own = validate_section(PrepareConfig, {"recipe": recipe, **written})
    assert own == plain.model_copy(update=written)
    config = load_config(None, [f"data.prepare.recipe={recipe}", "data.prepare.max_tokens=7"])
    assert config.data.prepare == plain.model_copy(update={"max_tokens": 7})
    (tmp_path / "resolved.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert f"tokenizer: {plain.tokenizer}" in dump_yaml(config)
    assert load_config(tmp_path / "resolved.yaml") == config


def test_flags_that_may_be_null(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(f"A Dog, {i} cats" for i in range(50)) + "\na cat alone\n", encoding="utf-8")
    flags = ["--recipe", "coco_captions", "--keyword", "dog", "--valid-fraction", "0.4"]
    assert main(["data", "prepare", str(path), str(tmp_path / "out"), *flags]) == 0
    made = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    # Every caption is "a dog cats", so all are in one split.
    assert sum(split["texts"] for split in made["splits"].values()) == 50
    with pytest.raises(SystemExit):
        main(["data", "prepare", str(path), str(tmp_path / "out"), "--recipe", "captions"])
    assert "wikitext" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["wikitex", 3, ["lines"]])
def test_an_unknown_recipe_is_refused(recipe: Any) -> None:
    with pytest.raises(ConfigError, match="recipe"):
        validate_section(PrepareConfig, {"recipe": recipe})
    with pytest.raises(ConfigError, match=r"data\.prepare\.recipe"):
        load_config(None, [f"data.prepare.recipe={recipe}"])


@pytest.mark.parametrize("keyword", ["", "  "])
def test_an_empty_keyword_is_refused(keyword: str) -> None:
    with pytest.raises(ConfigError, match="keyword"):
        validate_section(PrepareConfig, {"keyword": keyword})


@pytest.mark.parametrize(
    ("line", "level"),
    [
        (" = Homarus gammarus = ", 1),
        ("= A =\r", 1),
        (" = = Description = = ", 2),
        (" = = = = Deep = = = = ", 4),
        (" text = text ", 0),
        (" = = unbalanced = ", 0),
        (" = no end", 0),
        (" = = ", 0),
        ("=", 0),
        ("", 0),
        ("=x=", 0),
    ],
)
def test_headings(line: str, level: int) -> None:
    assert heading_level(line, " \r") == level
    # A formula in a paragraph looks the same, but no empty line follows it.
    assert heading_level(line, " 1 <unk> .") == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("It weighs 0 @.@ 7 kg . H. gammarus is blue .", ["It weighs 0 @.@ 7 kg .", "H. gammarus is blue ."]),
        ("Why ? No ! ! Yes", ["Why ?", "No ! !", "Yes"]),
        ('He said " go . " Then " stay . "', ['He said " go . "', 'Then " stay . "']),
        ('It ended . " Then " said he .', ["It ended .", '" Then " said he .']),
        ("( It ended . ) And <unk> .", ["( It ended . )", "And <unk> ."]),
        ("Wait . . . what", ["Wait . . .", "what"]),
        (" \t ", []),
    ],
)
def test_sentences_of_tokenised_text(line: str, expected: list[str]) -> None:
    assert list(sentences(line)) == expected


WIKITEXT = " \n = One = \n \n First , <unk> . Second . \n \n = = Part = = \n \n Third . \n \n = Two = \n \n Fourth . \n"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("document", ["First , <unk> . Second . Third .", "Fourth ."]),
        ("line", ["First , <unk> . Second .", "Third .", "Fourth ."]),
        ("sentence", ["First , <unk> .", "Second .", "Third .", "Fourth ."]),
    ],
)
def test_wikitext_records(tmp_path: Path, record: str, expected: list[str]) -> None:
    (tmp_path / "wiki.train.tokens").write_text(WIKITEXT, encoding="utf-8")
    assert texts(tmp_path / "wiki.train.tokens", recipe="wikitext", record=record) == expected


ARTICLES = {"valid": 60, "test": 60}


@pytest.mark.parametrize("real", ["wikitext-2"], indirect=True)
def test_wikitext_2(real: Path, tmp_path: Path) -> None:
    """The training file is not at hand: the validation file trains here, and the test file tests."""
    (tmp_path / "in").mkdir()
    for split, file in (("train", "valid"), ("test", "test")):
        (tmp_path / "in" / f"wiki.{split}.tokens").write_bytes((real / f"{file}.txt").read_bytes())
    dataset = prepare(str(tmp_path / "in"), tmp_path / "out", PrepareConfig(recipe="wikitext"))
    for split, file in (("train", "valid"), ("test", "test")):
        content = (real / f"{file}.txt").read_text(encoding="utf-8")
        bodies = re.split(r"\n \n = [^=\n].*[^=\n] = (?=\n \n)", "\n" + content)[1:]
        words = [re.sub(r"\n \n( =)+ .*(= )+(?=\n \n)", " ", body).split() for body in bodies]
        facts = dataset.manifest["splits"][split]
        assert facts["texts"] == len(words) == ARTICLES[file]
        windows = [-(-len(document) // 127) for document in words]
        assert facts["sequences"] == sum(windows)
        assert facts["tokens"] == sum(map(len, words)) + sum(windows)
        if split == "train":
            # Nothing is unknown but what the corpus itself calls so.
            assert facts["unknown_tokens"] == sum(document.count("<unk>") for document in words)
            assert dataset.tokenizer.vocab_size == len({w for document in words for w in document}) - 1 + 4
    lines = (real / "valid.txt").read_text(encoding="utf-8").split("\n")
    # No formula in this file looks like a heading.
    paragraphs = [line.split() for line in lines if line.strip() and not re.fullmatch(r" (= )+.*( =)+ ", line)]
    found = texts(real / "valid.txt", recipe="wikitext", record="line")
    assert [text.split() for text in found] == paragraphs
    cut = texts(real / "valid.txt", recipe="wikitext", record="sentence")
    assert " ".join(cut).split() == [word for paragraph in paragraphs for word in paragraph]
    # After an end only marks follow, and all sentences but a paragraph's last have an end.
    for text in cut:
        after_end = re.split(r"(?:^| )[.?!](?= |$)", text, maxsplit=1)[1:]
        assert not re.search(r"\w", "".join(after_end))
    assert all(re.search(r"(^| )[.?!]( |$)", text) for p in paragraphs for text in list(sentences(" ".join(p)))[:-1])


@pytest.mark.parametrize("real", ["coco_captions/train.txt"], indirect=True)
@pytest.mark.parametrize(("keyword", "captions"), [("bathroom", 1555), ("kitchen", 1022), ("elephant", None)])
def test_coco_captions_by_keyword(real: Path, tmp_path: Path, keyword: str, captions: int | None) -> None:
    lines = real.read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if keyword in re.findall(r"\w+", line.lower())]
    assert captions is None or len(kept) == captions
    dataset = prepare(str(real), tmp_path / "out", PrepareConfig(recipe="coco_captions", keyword=keyword))
    splits = dataset.manifest["splits"]
    assert set(splits) == {"train", "valid"}
    assert splits["train"]["texts"] + splits["valid"]["texts"] == len(kept)
    assert 0.15 < splits["valid"]["texts"] / len(kept) < 0.25
    assert dataset.manifest["filtered_texts"] == sum(1 for line in lines if line.strip()) - len(kept)
    # Letters and spaces only, each caption on its own, as Python cleans it.
    clean = Counter(" ".join(re.sub(r"[^a-z ]", " ", re.sub(r"(?<=[a-z])'(?=[a-z])", "", c)).split()) for c in kept)
    stored = Counter(
        dataset.tokenizer.decode(ids)
        for name in splits
        for ids in dataset.split(name).read(0, splits[name]["sequences"])
        if len(ids) < 32 and not (ids == 3).any()
    )
    assert not stored - clean
    assert stored.total() > 0.8 * len(kept)


@pytest.mark.parametrize("real", ["multi30k_en", "ptb"], indirect=True)
def test_lines(real: Path) -> None:
    """One sentence a line, zipped or not, in the splits of the files."""
    counts: Counter[str] = Counter()
    source = open_source(str(real), PrepareConfig(recipe="lines"), real)
    sentences_of = Counter(split for split, _ in source.texts(counts))
    published = {
        "multi30k_en": {"train": 145_000, "valid": 5_070, "test": 5_000},
        "ptb": {"train": 42_068, "valid": 3_370, "test": 3_761},
    }
    assert sentences_of == published[real.name]
