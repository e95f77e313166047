"""Recipes: presets of `PrepareConfig` for well-known kinds of corpora. What is written beside a recipe wins over it.

wikitext: WikiText's token files (`wiki.train.tokens`, or train.txt and so on), tokenised already. A document runs
    from one ` = Title = ` to the next; it is cut into windows of `max_tokens`, so no text is lost. Titles and section
    headings (` = = Section = = `) are markup and left out of every record; to keep every line, headings too, as
    language-model benchmarks do, set `format: text` and `record: line`. `record: line` gives paragraphs and
    `record: sentence` sentences, which end at the tokens `.`, `?` and `!` (` @.@ ` is none of them). `<unk>` is id 3.
coco_captions: image captions, from the official captions_*.json, a tab-separated file, or a caption a line.
    Lower-cased, punctuation and digits stripped, words at white space, at most 31 words, a fifth held out for
    validation and nothing for testing. Where captions name their image, all captions of an image are in one split.
    One caption is one sequence. `keyword` keeps the captions with a word in them. `text_field` is caption.
lines: one sentence a line, tokenised already, as in PTB: words at white space, `<unk>` is id 3.
"""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "wikitext": {
        "format": "wikitext",
        "record": "document",
        "tokenizer": "word",
        "pre_tokenizer": "whitespace",
        # More than the 33,278 words of WikiText-2; WikiText-103 has 267,735.
        "vocab_size": 40_000,
        "max_tokens": 128,
        "too_long": "split",
    },
    "coco_captions": {
        "record": "line",
        "text_field": "caption",
        "lowercase": True,
        "strip_punctuation": True,
        "strip_digits": True,
        "tokenizer": "word",
        "pre_tokenizer": "whitespace",
        "vocab_size": 10_000,
        "max_tokens": 32,
        "too_long": "truncate",
        "valid_fraction": 0.2,
        "test_fraction": 0.0,
    },
    "lines": {
        "record": "line",
        "tokenizer": "word",
        "pre_tokenizer": "whitespace",
        "vocab_size": 20_000,
        # The longest sentence of PTB has 82 words.
        "max_tokens": 128,
    },
}
