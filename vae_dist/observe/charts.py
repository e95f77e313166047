"""Charts as inline SVG: no library, no script, no external resource. Numbers in, markup out.

Colours come from the page's style sheet through classes, so a chart follows the reader's light or dark
scheme. Values that are not finite leave a gap. `data-x` and `data-y` hold "pixel pixel value value", the two
ends of a linear axis, from which the page's script reads values back under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 24.0, 34.0
# Longer curves are thinned to the lowest and highest point of each of so many columns: spikes stay visible.
_COLUMNS = 300
_MOST_DOTS = 60
_LOWEST_BAR = 2.0
_HUGE = 1e300

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A named curve.

    Attributes:
        name: as the legend shows it.
        style: CSS class, `train` or `valid`.
        points: (x, y) in data units, by rising x.
        dots: mark each point, as fits a few measurements; the exact value is in its tooltip.
    """

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar: its value, the text of its tooltip, and the CSS class that colours it."""

    value: float
    tooltip: str
    style: str


@dataclass(frozen=True)
class Axis:
    """A linear axis: data `low` is drawn at pixel `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ends(self) -> str:
        """For the `data-` attributes."""
        return f"{self.start:g} {self.end:g} {self.low!r} {self.high!r}"


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    from_zero: bool = False,
    focus: bool = False,
    width: int = 440,
    height: int = 240,
) -> Markup:
    """Curves over training steps.

    Args:
        title: above the chart.
        unit: of the vertical axis.
        series: at least one; drawn in order, the last on top.
        from_zero: the vertical axis begins at 0.
        focus: the first tenth of the steps does not set the range, so that the drop at the start of training
            does not flatten all that follows; the curve enters from the edge.
        width, height: of the drawing, in its own units; it scales to the page.
    """
    finite = [(x, y) for s in series for x, y in s.points if _finite(x) and _finite(y)]
    if not finite:
        return _figure(title, series, _empty(unit, width, height), "", width, height)
    x = _range([p[0] for p in finite], _LEFT, width - _RIGHT, pad=0.0)
    late = [p[1] for p in finite if not focus or p[0] >= x.low + 0.1 * (x.high - x.low)]
    y = _range(late + [0.0] * from_zero, height - _BOTTOM, _TOP, pad=0.06, floor=0.0 if from_zero else None)
    curves = Markup("").join(_curve(s, x, y) for s in series)
    box = Markup('<svg x="{:g}" y="{:g}" width="{:g}" height="{:g}" viewBox="{:g} {:g} {:g} {:g}">{}</svg>')
    area = (_LEFT - 4, _TOP - 4, width - _LEFT + 4, height - _BOTTOM - _TOP + 8)
    body = _grid(x, y, unit, "step", width, height) + box.format(*area, *area, curves)
    return _figure(title, series, body, Markup(' data-x="{}" data-y="{}"').format(x.ends, y.ends), width, height)


def bar_chart(
    title: str, unit: str, x_label: str, bars: Sequence[Bar], *, width: int = 640, height: int = 200
) -> Markup:
    """Upright bars from zero, numbered from 0; one too low to see is drawn `_LOWEST_BAR` high."""
    values = [bar.value for bar in bars if _finite(bar.value)]
    if not values:
        return _figure(title, (), _empty(unit, width, height), "", width, height)
    y = _range([*values, 0.0], height - _BOTTOM, _TOP, pad=0.06, floor=min(0.0, *values))
    x = Axis(-0.5, len(bars) - 0.5, _LEFT, width - _RIGHT)
    step = (x.end - x.start) / len(bars)
    gap = min(4.0, 0.2 * step)
    shape = Markup('<rect class="bar {}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"><title>{}</title></rect>')
    drawn = Markup("")
    for i, bar in enumerate(bars):
        if _finite(bar.value):
            height_px = max(_LOWEST_BAR, abs(y(bar.value) - y(0.0)))
            top = y(0.0) - (height_px if bar.value >= 0 else 0.0)
            drawn += shape.format(bar.style, x(i) - (step - gap) / 2, top, step - gap, height_px, bar.tooltip)
    return _figure(title, (), _grid(x, y, unit, x_label, width, height) + drawn, "", width, height)


def comparison_chart(label: str, rows: Sequence[tuple[str, float, str]], *, width: int = 440) -> Markup:
    """Lying bars from zero, one a row: (name, value, CSS class); the value stands at the end of its bar."""
    finite = [value for _, value, _ in rows if _finite(value) and value > 0]
    longest, left, row = max(finite, default=1.0), 128.0, 30.0
    head = Markup('<text class="name" x="{:g}" y="{:g}" text-anchor="end">{}</text>')
    body = Markup('<rect class="bar {}" x="{:g}" y="{:g}" width="{:.2f}" height="18"/>')
    tail = Markup('<text class="value" x="{:.2f}" y="{:g}">{}</text>')
    drawn = Markup("")
    for i, (name, value, style) in enumerate(rows):
        length = max(0.0, value) / longest * (width - left - 64) if _finite(value) else 0.0
        baseline = i * row + 19
        drawn += head.format(left - 10, baseline, name) + body.format(style, left, baseline - 13, length)
        drawn += tail.format(left + length + 8, baseline, f"{value:,.1f}")
    return _svg(label, drawn, "", width, row * len(rows) + 2)


def ticks(low: float, high: float, about: int = 4, whole: bool = False) -> list[float]:
    """About so many (at least 3) round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart.

    Never fewer than two, unless they have to be `whole`.
    """
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    limits = ((1, 1.5), (2, 3.5), (5, 7.5), (10, math.inf))
    step = power * next(multiple for multiple, limit in limits if raw < limit * power)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float, step: float) -> str:
    """The shortest text that tells ticks `step` apart: 0.25, 1,500, 20k, 3M, 2e-4."""
    if value == 0:
        return "0"
    if (step < 1e-4 and abs(value) < 0.01) or abs(value) >= 1e10:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= size:
            return f"{value / size:,.10g}{suffix}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"


def _curve(series: Series, x: Axis, y: Axis) -> Markup:
    """Polylines between gaps, and dots where a point has no neighbours or `dots` asks for them."""
    drawn = Markup("")
    for run in _runs(series.points):
        points = _thin(run) if len(run) > 2 * _COLUMNS else run
        at = " ".join(f"{x(px):.2f},{y(py):.2f}" for px, py in points)
        drawn += Markup('<polyline class="line {}" points="{}"/>').format(series.style, at)
        if len(points) == 1 or (series.dots and len(points) <= _MOST_DOTS):
            dot = Markup('<circle class="dot {}" cx="{:.2f}" cy="{:.2f}" r="3"><title>{}</title></circle>')
            for px, py in points:
                text = f"{series.name}, step {px:,.10g}: {py:,.6g}"
                drawn += dot.format(series.style, x(px), y(py), text)
    return drawn


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """Stretches of finite points."""
    runs: list[list[Point]] = [[]]
    for px, py in points:
        if _finite(px) and _finite(py):
            runs[-1].append((px, py))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thin(points: Sequence[Point]) -> list[Point]:
    """The ends, and the lowest and highest point of each of `_COLUMNS` equal stretches, in their order."""
    kept = {0, len(points) - 1}
    edges = [i * len(points) // _COLUMNS for i in range(_COLUMNS + 1)]
    for first, end in pairwise(edges):
        column = range(first, end)
        kept |= {min(column, key=lambda i: points[i][1]), max(column, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _range(values: Sequence[float], start: float, end: float, *, pad: float, floor: float | None = None) -> Axis:
    """An axis that holds all values with a margin, never of length zero."""
    low, high = min(values), max(values)
    margin = pad * (high - low) if high > low else max(0.5, 0.05 * abs(high))
    return Axis(low - margin if floor is None else floor, high + margin, start, end)


def _grid(x: Axis, y: Axis, unit: str, x_label: str, width: int, height: int) -> Markup:
    """Horizontal grid lines, the tick labels of both axes, and the names of both."""
    parts = []
    y_ticks = ticks(y.low, y.high, max(3, height // 55))
    x_ticks = ticks(x.low, x.high, max(3, width // 90), whole=True)
    y_step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else y.high - y.low
    x_step = x_ticks[1] - x_ticks[0] if len(x_ticks) > 1 else 1.0
    line = Markup('<line class="grid" x1="{0:g}" x2="{1:g}" y1="{2:.2f}" y2="{2:.2f}"/>')
    text = Markup('<text class="tick {}" x="{:.2f}" y="{:.2f}" text-anchor="{}">{}</text>')
    for value in y_ticks:
        parts.append(line.format(x.start, x.end, y(value)))
        parts.append(text.format("y", x.start - 7, y(value) + 3.5, "end", tick_label(value, y_step)))
    for value in x_ticks:
        parts.append(text.format("x", x(value), y.start + 15, "middle", tick_label(value, x_step)))
    parts.append(text.format("label", 0, 10, "start", unit))
    parts.append(text.format("label", x.end, height - 3, "end", x_label))
    return Markup("").join(parts)


def _empty(unit: str, width: float, height: float) -> Markup:
    label = Markup('<text class="tick label" x="0" y="10">{}</text>').format(unit)
    text = Markup('<text class="tick" x="{:g}" y="{:g}" text-anchor="middle">no finite values</text>')
    return label + text.format(width / 2, height / 2)


def _figure(title: str, series: Sequence[Series], body: Markup, attributes: str, width: float, height: float) -> Markup:
    """The chart under its title, with a legend if there is more than one curve."""
    keys = Markup("").join(
        Markup('<span class="key {}">{}</span>').format(s.style, s.name) for s in series if len(series) > 1
    )
    caption = Markup("<figcaption><b>{}</b>{}</figcaption>").format(title, keys)
    return Markup('<figure class="chart">{}{}</figure>').format(caption, _svg(title, body, attributes, width, height))


def _svg(label: str, body: Markup, attributes: str, width: float, height: float) -> Markup:
    return Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}"{}>{}</svg>').format(
        width, height, label, attributes, body
    )


def _finite(value: object) -> bool:
    """Whether a value can be drawn; metrics of a run that went wrong hold NaN, inf or None."""
    # False for NaN too.
    return isinstance(value, int | float) and abs(value) < _HUGE
