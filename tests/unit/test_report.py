"""The report page: what it shows and escapes, where its curves lie, that it needs nothing from outside."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.observe import charts
from vae_dist.observe.report import OPTIONAL, REQUIRED, render_report, write_report

VOID = {"meta", "br", "hr", "img", "link", "input", "base"}

TRAIN = [
    {
        "kind": "train",
        "step": s,
        "elbo_per_seq": 130.0 - s / 10,
        "rec_per_seq": 120.0 - s / 10,
        "kl_per_seq": 10.0,
        "beta": s / 200,
        "tokens_per_second": 5e4,
        "learning_rate": 1e-3,
        "grad_norm": 1.5,
    }
    for s in range(20, 220, 20)
]
VALID = [
    {
        "kind": "valid",
        "step": s,
        "elbo_per_seq": 131.0 - s / 10,
        "rec_per_seq": 121.0 - s / 10,
        "kl_per_seq": 9.5,
        "active_units": s // 50,
        "mutual_information_nats": s / 100,
        "ppl": 300.0 - s,
    }
    for s in (50, 100, 150, 200)
]
REPORT: dict[str, Any] = {
    "title": "vae_dist: ptb & more",
    "run_dir": "/runs/ptb-1f",
    "finished_at": "2026-01-02T03:04:05+00:00",
    "headline": {
        "run_dir": "/runs/ptb-1f",
        "data_dir": "data/ptb",
        "steps": 12345,
        "tokens_seen": 9876543,
        "tokens_per_second": 50123.4,
        "valid": {
            "elbo_per_seq": 103.456,
            "rec_per_seq": 96.789,
            "kl_per_seq": 6.667,
            "nll_per_token": 4.72,
            "ppl": 112.34,
            "active_units": 2,
            "mutual_information_nats": 5.43,
        },
        "baselines": {"unigram_ppl": 687.03, "bigram_ppl": 201.48},
        "seconds": 3725.0,
    },
    "curves": {"train": TRAIN, "valid": VALID},
    "kl_per_dim": [0.75, 0.002, 0.5],
    "active_unit_threshold": 0.01,
    "variance_of_posterior_mean_per_dim": [0.9, 0.001, 0.6],
    "latent_use": {
        "nll_own_z_per_seq": 96.79,
        "nll_swapped_z_per_seq": 109.9,
        "swap_cost_nats_per_seq": 13.11,
        "sequences": 3370,
    },
    "samples": {
        "seed_first": 40,
        "texts": [
            "<script>alert(1)</script>",
            "a <unk> \u05e9\u05dc \U0001f642",
            "{{ title }} & \"two\" 'one'",
        ],
        "verbatim_fraction": 0.0525,
        "distinct_2": 0.871,
        "decoding": {"temperature": 0.9, "top_k": 17},
    },
    "reconstructions": [{"input": "first <b>input</b>", "output": "first output"}],
    "interpolation": {"a": "from here", "b": "to there", "points": [{"t": 0.25, "text": "between"}]},
    "throughput": {
        "tokens_per_second": 50123.4,
        "step_seconds_median": 0.0625,
        "workers": 4,
        "device": "GPU <X>",
        "precision": "bf16",
    },
    "counts": {
        "train_sequences": 42068,
        "train_tokens": 929589,
        "valid_sequences": 3371,
        "valid_tokens": 73760,
        "parameters": 7812345,
    },
    "config_yaml": "model:\n  unknown_token: <unk>\n",
    "versions": {"torch": "2.13.0+cpu"},
    "next_commands": ["vae-dist sample model --num 10 > 'out & more.txt'"],
}
SHOWN = """
vae_dist: ptb & more | /runs/ptb-1f | 2026-01-02T03:04:05+00:00 | data/ptb | 12,345 steps | 9,876,543 tokens
50,123 tokens per second | 103.46 nats per sequence | 96.79 nats per sequence | 6.67 nats per sequence
4.720 nats per token | 112.3 per token | 2 / 3 | 5.43 nats | 687.0 | 201.5 | 1h 02m | at least 0.01
13.11 nats per sequence | from 96.79 to 109.90 nats per sequence | 3,370 | 5.25 % | 87.10 % | 0.062 seconds
temperature 0.9, top k 17. | 40 <script>alert(1)</script> | 41 a <unk> \u05e9\u05dc \U0001f642
42 {{ title }} & "two" 'one' | first <b>input</b> | first output | A from here | 0.25 between | B to there
GPU <X> | bf16 | 42,068 | 929,589 | 3,371 | 73,760 | 7,812,345 | unknown_token: <unk> | torch 2.13.0+cpu
vae-dist sample model --num 10 > 'out & more.txt'
ELBO | Reconstruction | KL to the prior | Active units | Gradient norm | Weight of the KL
"""


class Page(HTMLParser):
    """Elements with attributes, visible text, and whether every element was closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.code = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], "unclosed elements"

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def of_class(self, tag: str, name: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and name in a.get("class", "").split()]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.code += data
        else:
            self.texts.append(data)


def test_every_value_of_the_dict_is_shown_with_its_unit() -> None:
    text = Page(render_report(REPORT)).text
    shown = SHOWN.strip().replace("\n", " | ").split(" | ")
    assert [value for value in shown if value not in text] == []
    assert "nan" not in text


def test_texts_are_escaped_and_add_no_element() -> None:
    html = render_report(REPORT)
    assert "<script>alert" not in html and "<unk>" not in html and "<b>input" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    hostile, harmless = copy.deepcopy(REPORT), copy.deepcopy(REPORT)
    payload = "</title></pre></svg><script>x</script>\"><img src=x onerror='y'>"
    for report, value in ((hostile, payload), (harmless, "harmless")):
        report |= {"title": value, "run_dir": value, "config_yaml": value, "next_commands": [value]}
        report["versions"] = {value: value}
        report["samples"]["texts"] = [value]
        report["samples"]["decoding"] = {value: value}
        report["throughput"]["device"] = value
        report["interpolation"]["points"] = [{"t": 0.5, "text": value}]
    assert Page(render_report(hostile)).elements == Page(render_report(harmless)).elements


def test_page_refers_to_nothing_outside() -> None:
    html = render_report(REPORT)
    page = Page(html)
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}
    assert [(tag, name) for tag, attrs in page.elements for name in attrs if name in loading] == []
    assert not re.search(r"https?://|//\w+\.\w+|@import|url\(", html)
    assert {"link", "img", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "prefers-color-scheme: dark" in page.code


def number(label: str) -> float:
    """What a tick label says."""
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(label[-1], 1.0)
    return factor * float(label.rstrip("kMG").replace(",", ""))


class Drawing:
    """A chart read back: pixel positions of its tick labels, and its points."""

    def __init__(self, svg: str) -> None:
        tick = r'<text class="tick {}" x="([\d.-]+)" y="([\d.-]+)"[^>]*>([^<]+)</text>'
        self.x_ticks = [(number(t[2]), float(t[0])) for t in re.findall(tick.format("x"), svg)]
        # A label's baseline lies 3.5 below the line it names.
        self.y_ticks = [(number(t[2]), float(t[1]) - 3.5) for t in re.findall(tick.format("y"), svg)]
        lines = re.findall(r'<polyline class="line (\w+)" points="([^"]+)"', svg)
        self.lines = [(s, [tuple(map(float, p.split(","))) for p in points.split()]) for s, points in lines]

    @staticmethod
    def pixel(ticks: list[tuple[float, float]], value: float) -> float:
        """Where a value lies, judging by the first and last label alone."""
        (v0, p0), (v1, p1) = ticks[0], ticks[-1]
        return p0 + (value - v0) * (p1 - p0) / (v1 - v0)


@pytest.mark.parametrize("options", [{}, {"from_zero": True}, {"focus": True}, {"width": 260, "height": 143}])
def test_points_lie_where_the_tick_labels_say(options: dict[str, Any]) -> None:
    train = [(float(x), 3.0 + 40.0 / x) for x in range(5, 100, 5)]
    valid = [(20.0, 6.25), (60.0, 4.5)]
    series = [
        charts.Series("training", "train", train),
        charts.Series("validation", "valid", valid, dots=True),
    ]
    drawing = Drawing(charts.line_chart("Loss", "nats", series, **options))
    assert [style for style, _ in drawing.lines] == ["train", "valid"]
    assert len(drawing.x_ticks) >= 2 and len(drawing.y_ticks) > 2
    for (_, drawn), data in zip(drawing.lines, (train, valid), strict=True):
        assert len(drawn) == len(data)
        for (px, py), (x, y) in zip(drawn, data, strict=True):
            assert px == pytest.approx(Drawing.pixel(drawing.x_ticks, x), abs=0.05)
            assert py == pytest.approx(Drawing.pixel(drawing.y_ticks, y), abs=0.05)
    if options.get("from_zero"):
        assert drawing.y_ticks[0][0] == 0


def test_two_points_by_hand() -> None:
    svg = charts.line_chart("Loss", "nats", [charts.Series("a", "train", [(0.0, 0.0), (10.0, 100.0)])])
    # Drawing area x 46 to 430, y 206 (bottom) to 24 (top); 6 % of the range is free above and below.
    y_low, y_high = 206 - 182 * 6 / 112, 206 - 182 * 106 / 112
    assert f'points="46.00,{y_low:.2f} 430.00,{y_high:.2f}"' in svg


def test_focus_takes_its_range_from_the_later_steps() -> None:
    points = [(float(x), 1000.0 if x < 5 else 10.0 + x / 100) for x in range(101)]
    series = [charts.Series("training", "train", points)]
    assert Drawing(charts.line_chart("Loss", "nats", series, focus=True)).y_ticks[-1][0] < 20
    assert Drawing(charts.line_chart("Loss", "nats", series)).y_ticks[-1][0] == 1000


def test_bars_have_the_height_of_their_value_and_dead_ones_are_grey() -> None:
    page = Page(render_report(REPORT))
    bars = [a for a in page.of_class("rect", "bar") if "other" not in a["class"]][1:]
    assert [a["class"] for a in bars] == ["bar own", "bar dead", "bar own"]
    heights = [float(a["height"]) for a in bars]
    assert heights[2] / heights[0] == pytest.approx(0.5 / 0.75, rel=1e-3)
    bottoms = [float(a["y"]) + float(a["height"]) for a in bars]
    assert max(bottoms) - min(bottoms) < 0.02
    tooltip = "dimension 1: KL 0.002 nats, variance of posterior mean 0.001, dead"
    assert tooltip in page.text


def test_comparison_bars_are_in_proportion() -> None:
    page = Page(render_report(REPORT))
    widths = [float(a["width"]) for a in page.of_class("rect", "bar")[:3]]
    assert widths[1] / widths[0] == pytest.approx(201.48 / 687.03, rel=1e-3)
    assert widths[2] / widths[0] == pytest.approx(112.34 / 687.03, rel=1e-3)


def test_values_that_are_not_finite_leave_a_gap() -> None:
    values = [1.0, 2.0, math.nan, 4.0, math.inf, -math.inf, None, 3.0, 2.0]
    series = charts.Series("training", "train", [(float(i), v) for i, v in enumerate(values)])  # type: ignore[misc]
    svg = charts.line_chart("Loss", "nats", [series])
    assert [len(points) for _, points in Drawing(svg).lines] == [2, 1, 2]
    assert svg.count("<circle") == 1, "a point without neighbours is marked"
    assert not re.search(r"nan|inf\b|None", svg)


def test_a_run_that_went_wrong_still_has_a_page() -> None:
    report = copy.deepcopy(REPORT)
    for record in (*report["curves"]["train"], *report["curves"]["valid"]):
        record |= {name: math.nan for name in record if name not in ("kind", "step")}
    report["headline"]["valid"]["ppl"] = math.inf
    report["headline"]["valid"]["kl_per_seq"] = None
    report["kl_per_dim"] = [math.nan, math.inf, 0.5]
    page = Page(render_report(report))
    assert page.text.count("no finite values") == 10
    assert "n/a" in page.text
    drawn = [v for _, a in page.elements for name, v in a.items() if name in ("x", "y", "width", "height", "points")]
    assert not any("nan" in v or "inf" in v for v in drawn)


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats()), max_size=30), st.booleans(), st.booleans())
def test_any_numbers_give_a_chart_inside_its_frame(points: list[Any], from_zero: bool, focus: bool) -> None:
    series = [charts.Series("training", "train", sorted(points, key=lambda p: p[0]), dots=True)]
    svg = charts.line_chart("Loss", "nats", series, from_zero=from_zero and not focus, focus=focus)
    Page(svg)
    for _, line in Drawing(svg).lines:
        for x, y in line:
            assert 0 <= x <= 440
            assert focus or from_zero or 0 <= y <= 240


def test_long_curves_are_thinned_and_keep_their_spikes() -> None:
    points = [(float(i), 1.0 + (i % 7) / 100) for i in range(50_000)]
    points[31_234] = (31_234.0, 9.0)
    svg = charts.line_chart("Loss", "nats", [charts.Series("training", "train", points)])
    drawing = Drawing(svg)
    assert len(drawing.lines[0][1]) <= 602
    top = min(drawing.lines[0][1], key=lambda p: p[1])
    assert top[1] == pytest.approx(Drawing.pixel(drawing.y_ticks, 9.0), abs=0.05)
    assert drawing.lines[0][1] == sorted(drawing.lines[0][1])


@pytest.mark.parametrize(
    ("value", "step", "label"),
    [
        (0.0, 0.5, "0"),
        (0.25, 0.05, "0.25"),
        (1500.0, 500.0, "1,500"),
        (20_000.0, 5_000.0, "20k"),
        (-3.0, 1.0, "-3"),
        (3e6, 1e6, "3M"),
        (2e-4, 5e-5, "2e-4"),
        (5.00015, 5e-5, "5.00015"),
        (2.5e-5, 5e-6, "2.5e-5"),
        (1e12, 1e11, "1e12"),
    ],
)
def test_tick_labels(value: float, step: float, label: str) -> None:
    assert charts.tick_label(value, step) == label


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9), st.integers(3, 12))
def test_ticks_are_few_round_and_inside(low: float, length: float, about: int) -> None:
    found = charts.ticks(low, low + length, about)
    assert 2 <= len(found) <= 1.75 * about + 1
    assert all(low - 1e-6 * length <= t <= low + length * (1 + 1e-6) for t in found)


@pytest.mark.parametrize("key", sorted(OPTIONAL))
def test_a_missing_optional_key_leaves_its_section_out(key: str) -> None:
    Page(render_report({name: value for name, value in REPORT.items() if name != key}))


def test_the_smallest_report_has_only_what_it_was_given() -> None:
    headline = {"run_dir": "/runs/x", "steps": 3, "valid": {}, "baselines": {}}
    page = Page(render_report({"title": "small", "headline": headline, "curves": {"train": TRAIN, "valid": []}}))
    headings = (
        "Latent space",
        "Text",
        "Samples",
        "Reconstructions",
        "Interpolation",
        "Throughput",
        "Versions",
        "Next",
    )
    assert not any(heading in page.text for heading in headings)
    assert "3 steps" in page.text and "Perplexity" not in page.text.replace("reconstruction and perplexity", "")
    Page(render_report({"title": "no curves", "headline": {}, "curves": {}}))


def test_missing_required_and_unknown_keys_are_all_named() -> None:
    assert {"title", "headline", "curves"} == REQUIRED
    with pytest.raises(ValueError, match=r"'curves' is missing; .*'headline' is missing; key 'sampels' is not known"):
        render_report({"title": "x", "sampels": {}})


def test_written_page_is_whole_utf8_and_reads_back(tmp_path: Path) -> None:
    report = copy.deepcopy(REPORT)
    report["samples"]["texts"] = ["half a pair \ud83d", "whole \U0001f642"]
    write_report(report, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_bytes().decode("utf-8")
    assert "whole \U0001f642" in html and html.rstrip().endswith("</html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
