"""Draw `results/training-speed.json` and `results/step-scaling.json`: python tests/bench/picture.py"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PICTURE = RESULTS / "training-speed.svg"
# Others than ours, with their marks.
_LOOPS = {"loop_bf16": ("plain loop, bf16", "loop"), "loop_bf16_compiled": ("the same compiled", "compiled"),
          "loop_fp32": ("plain loop, fp32", "fp32")}  # fmt: skip
_AXES = {"vocabulary": "vocabulary", "width": "hidden width", "batch": "sequences a batch"}
_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1d1f21; }
  .soft { fill: #5c6166; font-size: 12px; } .title { font-weight: 600; }
  .ours { fill: #1f625e; } .line { fill: none; stroke: #1f625e; stroke-width: 2; } .dash { stroke-dasharray: 4 4; }
  .axis { stroke: #a9a7a2; } .loop { fill: #a9a7a2; } .compiled { fill: #d8a05a; } .fp32 { fill: #c5c9cc; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e4e0; } .soft { fill: #a3a7aa; } .ours { fill: #7cc4bd; } .line { stroke: #7cc4bd; }
    .loop { fill: #6b7074; } .fp32 { fill: #45494c; }
  }
"""


def draw(speed: dict[str, Any], scaling: dict[str, Any]) -> str:
    """The SVG: contenders as bars, and below them the step over three sizes."""
    bars, height = _bars(speed["results"], 30.0)
    plots = "".join(
        _plot(_AXES[name], points, 20.0 + 300.0 * i, height + 50.0)
        for i, (name, points) in enumerate(scaling["sizes"].items())
    )
    whole = height + 290.0
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 {whole:.0f}" role="img" '
        f'aria-label="Speed of the training step">\n<style>{_STYLE}</style>\n'
        f"{_text(20, 20, 'Target tokens a second, beside the loop that a user of PyTorch would write', 'title')}{bars}"
        f"{_text(20, height + 20, 'Milliseconds of a step, and (dashed) of its matrix products', 'title')}"
        f"{plots}</svg>\n"
    )


def _bars(results: Sequence[dict[str, Any]], top: float) -> tuple[str, float]:
    found, y = "", top
    for result in results:
        speeds = result["tokens_per_second"]
        found += _text(20, y + 16, f"{result['model']}, {result['batch_sequences']} sequences")
        # Each model has a scale of its own: ours is as long everywhere.
        for name, (label, style) in {"ours": (f"vae_dist, {result['precision']}", "ours"), **_LOOPS}.items():
            if name not in speeds:
                continue
            length = 400.0 * speeds[name] / speeds["ours"]
            ratio = "" if name == "ours" else f", ours {speeds['ours'] / speeds[name]:.1f} times"
            found += f'<rect class="{style}" x="240" y="{y + 5:.0f}" width="{length:.1f}" height="13" rx="2"/>\n'
            found += _text(248 + length, y + 16, f"{speeds[name]:,.0f}  {label}{ratio}", "soft")
            y += 17
        y += 14
    return found, y


def _plot(title: str, points: Sequence[dict[str, float]], left: float, top: float) -> str:
    """Both axes from 0, so that what is proportional is a straight line through the corner."""
    width, height = 230.0, 170.0
    widest, slowest = max(p["size"] for p in points), max(p["step_ms"] for p in points)

    def place(point: dict[str, float], what: str) -> str:
        return f"{left + 40 + width * point['size'] / widest:.1f},{top + height * (1 - point[what] / slowest):.1f}"

    corner = f"{left + 40:.1f},{top + height:.1f}"
    found = f'<path class="axis" fill="none" d="M{left + 40:.1f},{top:.1f} L{corner} h{width:.1f}"/>\n'
    found += "".join(
        f'<polyline class="line{style}" points="{" ".join(place(point, what) for point in points)}"/>\n'
        for what, style in (("step_ms", ""), ("products_ms", " dash"))
    )
    for point in points:
        x, y = place(point, "step_ms").split(",")
        found += f'<circle class="ours" cx="{x}" cy="{y}" r="3.5"/>\n'
        if point is not points[0]:
            found += _text(float(x), top + height + 16, f"{point['size']:,}", "soft", "middle")
    found += _text(left + 34, top + 8, f"{slowest:,.0f}", "soft", "end") + _text(
        left + 34, top + height, "0", "soft", "end"
    )
    return found + _text(left + 40 + width / 2, top + height + 36, title, "soft", "middle")


def _text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>\n'


if __name__ == "__main__":
    PICTURE.write_text(
        draw(
            *(
                json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
                for name in ("training-speed", "step-scaling")
            )
        ),
        encoding="utf-8",
    )
    print(PICTURE)
