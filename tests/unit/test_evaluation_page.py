"""The page of an evaluation: every number with its definition, every text escaped, nothing from outside."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vae_dist.observe import definitions
from vae_dist.observe.evaluation_page import OPTIONAL, REQUIRED, render_evaluation, write_evaluation

VOID = {"meta", "br", "hr", "img", "link", "input", "base"}


def sample_row(name: str, base: float) -> dict[str, Any]:
    """A row with a value of its own in every column."""
    keys = [key for key in definitions.SAMPLE_QUALITY if key != "sequences"]
    return {"name": name, "sequences": 321, **{key: base + i / 100 for i, key in enumerate(keys)}}


EVALUATION: dict[str, Any] = {
    "title": "ptb & more",
    "model": "/runs/ptb/model",
    "data": "data/ptb",
    "split": "test",
    "seed": 17,
    "finished_at": "2026-01-02T03:04:05+00:00",
    "scores": {
        "elbo_per_seq": -101.234,
        "rec_per_seq": 93.111,
        "kl_per_seq": 8.123,
        "nll_per_token": 4.6191,
        "ppl": 101.456,
        "ppl_per_word": 133.777,
        "iw_nll_per_seq": 99.876,
        "iw_ppl": 95.321,
        "iw_ppl_per_word": 125.432,
        "importance_samples": 500,
        "active_units": 2,
        "mutual_information_nats": 5.312,
        "mutual_information_latents": 3761,
        "sequences": 3762,
        "tokens": 82430,
        "words": 78123,
        "kl_per_dim": [4.1, 0.003, 4.02],
    },
    "active_unit_threshold": 0.01,
    "variance_of_posterior_mean_per_dim": [0.9, 0.001, 0.7],
    "ngram_baselines": {
        "training_sequences": 42068,
        "held_out_sequences": 3763,
        "rows": [
            {"name": "Unigram", "nll_per_seq": 141.51, "ppl_per_token": 639.301, "ppl_per_word": 640.302},
            {"name": "Kneser-Ney 5-gram", "nll_per_seq": 108.52, "ppl_per_token": 141.193, "ppl_per_word": 142.194},
        ],
    },
    "reconstruction": {
        "sequences": 987,
        "seed": 18,
        "bleu": 12.345,
        "bleu_signature": "nrefs:1|case:mixed|eff:no|tok:none|smooth:exp|version:2.6.0",
        "token_accuracy": 0.2345,
        "exact_match": 0.0123,
        "examples": [{"input": "first <b>input</b>", "output": "first output"}],
    },
    "samples": {
        "sequences": 654,
        "seed_first": 40,
        "decoding": {"temperature": 0.9, "top_k": 17},
        "texts": ["<script>alert(1)</script>", "a <unk> \u05e9\u05dc \U0001f642", "{{ title }} & \"two\" 'one'"],
    },
    "sample_quality": {
        "sequences": 321,
        "seed": 19,
        "training_sequences": 42069,
        "held_out_sequences": 3764,
        "forward_model": "Our LM",
        "reverse_model": "Kneser-Ney 5-gram",
        "bleu_tokenizer": "none",
        "rows": [sample_row("This model", 0.1), sample_row("Real text", 0.4)],
    },
    "interpolation": {
        "pairs": 51,
        "steps": 13,
        "seed": 20,
        "neighbour_distance": 0.3214,
        "changed_fraction": 0.7654,
        "path_length_ratio": 1.5432,
        "order_correlation": 0.8765,
        "nll_bump": -0.0432,
        "examples": [
            {"a": "from here", "b": "to there", "points": [{"t": 0.25, "text": "between <i>"}]},
            {"a": "A2", "b": "B2", "points": [{"t": 0.75, "text": "nearly"}]},
        ],
    },
}
SHOWN = """
ptb & more | /runs/ptb/model | data/ptb , split test | 2026-01-02T03:04:05+00:00 | Seed 17.
95.3 per token, importance weighted, K = 500 | 125.4 per word, importance weighted, K = 500
-101.23 nats per sequence | 93.11 nats per sequence | 8.12 nats per sequence | 99.88 nats per sequence | 4.619 nats
5.31 nats, of at most 8.23 | 2 / 3 | 101.46 | 133.78 | 95.32 | 125.43 | 500 samples | 3,761 latents | 8.23 nats
3,762 | 82,430 | 78,123 | at least 0.01 | 42,068 training sequences | 3,763 held-out | 639.30 | 640.30 | 141.51
141.19 | 142.19 | 108.52 | 639.3 | 141.2 | 101.5 | 987 held-out sequences chosen with seed 18 | 12.35 of 100 | 23.45 %
nrefs:1|case:mixed|eff:no|tok:none|smooth:exp|version:2.6.0 | 1.23 % | first <b>input</b> | first output
first 3 of 654 seeds | temperature 0.9, top k 17. | 40 <script>alert(1)</script> | 41 a <unk> \u05e9\u05dc \U0001f642
42 {{ title }} & "two" 'one' | 321 sequences in each column, seed 19 | Our LM of 42,069 training | 3,764 held-out
tokenizer none | 51 pairs of held-out sequences chosen with seed 20, 13 steps | 0.321 | 76.54 % | 1.543 | 0.876
-0.043 nats per token | A from here | 0.25 between <i> | B to there | A A2 | 0.75 nearly | B B2
"""


class Page(HTMLParser):
    """Elements with attributes, visible text, and whether every element was closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], "unclosed elements"

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data.strip())


def test_every_value_of_the_dict_is_shown_with_its_unit() -> None:
    text = Page(render_evaluation(EVALUATION)).text
    shown = [value for line in SHOWN.strip().splitlines() for value in re.split(r" \| ", line)]
    assert [value for value in shown if value not in text] == []
    quality = definitions.SAMPLE_QUALITY
    for row in EVALUATION["sample_quality"]["rows"]:
        for key, value in row.items():
            if key not in ("name", "sequences"):
                assert (f"{100 * value:.2f} %" if quality[key].form == "percent" else f"{value:.2f}") in text


def test_every_number_has_its_definition_beside_it() -> None:
    text = Page(render_evaluation(EVALUATION)).text
    tables = (
        definitions.LIKELIHOOD,
        definitions.RECONSTRUCTION,
        definitions.SAMPLE_QUALITY,
        definitions.SMOOTHNESS,
        definitions.BASELINES,
    )
    for known in (known for table in tables for known in table.values()):
        assert known.label in text and known.sentence in text
        assert known.sentence.endswith(".")
        assert known.form in ("whole", "decimal", "fine", "percent", "text")


def test_a_number_that_is_not_known_is_shown_all_the_same() -> None:
    evaluation = {**EVALUATION, "scores": {**EVALUATION["scores"], "surprise_nats": 7.654}}
    assert "surprise_nats 7.654" in Page(render_evaluation(evaluation)).text


def test_texts_are_escaped_and_add_no_element() -> None:
    html = render_evaluation(EVALUATION)
    assert "<script" not in html and "<unk>" not in html and "<b>input" not in html and "between <i>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    hostile, harmless = copy.deepcopy(EVALUATION), copy.deepcopy(EVALUATION)
    payload = "</title></td></svg></style><script>x</script>\"><img src=x onerror='y'>"
    for evaluation, value in ((hostile, payload), (harmless, "harmless")):
        evaluation |= dict.fromkeys(("title", "model", "data", "split", "finished_at"), value)
        evaluation["ngram_baselines"]["rows"][0]["name"] = value
        evaluation["reconstruction"] |= {"bleu_signature": value, "examples": [{"input": value, "output": value}]}
        evaluation["samples"] |= {"texts": [value], "decoding": {value: value}}
        evaluation["sample_quality"] |= {"forward_model": value, "reverse_model": value, "bleu_tokenizer": value}
        evaluation["sample_quality"]["rows"][1]["name"] = value
        evaluation["interpolation"]["examples"] = [{"a": value, "b": value, "points": [{"t": 0.5, "text": value}]}]
        evaluation["scores"][value] = 1.0
    assert Page(render_evaluation(hostile)).elements == Page(render_evaluation(harmless)).elements


def test_page_refers_to_nothing_outside_and_runs_nothing() -> None:
    html = render_evaluation(EVALUATION)
    page = Page(html)
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}
    assert [(tag, name) for tag, attrs in page.elements for name in attrs if name in loading] == []
    assert not re.search(r"https?://|//\w+\.\w+|@import|url\(", html)
    assert {"link", "img", "iframe", "script"}.isdisjoint(tag for tag, _ in page.elements)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_charts_show_the_latent_and_the_comparison() -> None:
    page = Page(render_evaluation(EVALUATION))
    bars = [a for tag, a in page.elements if tag == "rect" and "bar" in a.get("class", "")]
    assert [a["class"] for a in bars] == ["bar own", "bar dead", "bar own", *["bar other"] * 2, *["bar own"] * 2]
    heights, widths = [float(a["height"]) for a in bars[:3]], [float(a["width"]) for a in bars[3:]]
    assert heights[2] / heights[0] == pytest.approx(4.02 / 4.1, rel=1e-3)
    assert widths[3] / widths[0] == pytest.approx(95.321 / 639.301, rel=1e-3)
    assert "dimension 1: KL 0.003 nats, variance of posterior mean 0.001, dead" in page.text


@pytest.mark.parametrize("key", sorted(OPTIONAL))
def test_a_missing_optional_key_leaves_its_section_out(key: str) -> None:
    whole, less = (Page(render_evaluation(e)).text for e in (EVALUATION, {**EVALUATION} | {key: None}))
    without = Page(render_evaluation({name: value for name, value in EVALUATION.items() if name != key})).text
    assert without == less and len(without) < len(whole)


def test_the_smallest_page_and_a_language_model() -> None:
    page = Page(render_evaluation({"title": "small", "scores": {}}))
    for heading in ("Reconstruction", "Samples", "Interpolation", "n-gram", "Quality"):
        assert heading not in page.text
    scores = {"elbo_per_seq": -99.0, "ppl": 91.5, "importance_samples": 0, "sequences": 7, "tokens": 70}
    text = Page(render_evaluation({"title": "LM", "scores": scores})).text
    assert "91.5 per token, upper bound" in text and "91.50" in text
    assert "samples" not in text and "Active units" not in text


def test_a_model_that_went_wrong_still_has_a_page() -> None:
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["scores"] |= {"ppl": math.inf, "elbo_per_seq": math.nan, "kl_per_dim": [math.nan, math.inf, 0.5]}
    evaluation["interpolation"] |= {"path_length_ratio": None, "order_correlation": None}
    evaluation["sample_quality"]["rows"][0]["forward_ppl_per_token"] = math.inf
    page = Page(render_evaluation(evaluation))
    assert page.text.count("n/a") >= 2 and "nan nats per sequence" in page.text and "inf" in page.text
    drawn = [v for _, a in page.elements for name, v in a.items() if name in ("x", "y", "width", "height")]
    assert not any("nan" in v or "inf" in v for v in drawn)


def test_missing_required_and_unknown_keys_are_all_named() -> None:
    assert {"title", "scores"} == REQUIRED
    with pytest.raises(ValueError, match=r"'scores' is missing; key 'sampels' is not known"):
        render_evaluation({"title": "x", "sampels": {}})


def test_written_page_is_whole_utf8_and_reads_back(tmp_path: Path) -> None:
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["samples"]["texts"] = ["half a pair \ud83d", "whole \U0001f642"]
    write_evaluation(evaluation, tmp_path / "evaluation.html")
    html = (tmp_path / "evaluation.html").read_bytes().decode("utf-8")
    assert "whole \U0001f642" in html and html.rstrip().endswith("</html>")
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.html"]
