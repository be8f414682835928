"""Line charts as inline SVG: curves over steps, smoothed, with intervals; no library, no script."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup

from latentdiff.html import render_template

COLORS = ("#3b76d6", "#d9662b", "#2e9b57", "#a84fc0", "#c23b5a", "#8a8a2a", "#1f9aa8", "#7a6a58")
WIDTH, HEIGHT = 480, 250  # of the view; a page scales it
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
MAX_POINTS = 400  # a longer curve shows means
SMOOTHED_SHARE = 0.05  # of a curve's lines, that the running mean reaches back over
STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: 1rem 1.5rem }
.chart { margin: 0; width: auto; min-width: 0 } .chart h3 { font-size: .95rem; margin: .4rem 0 0 }
.chart svg { display: block; width: 100%; height: auto; overflow: visible }
.chart text { font-size: 12px; fill: currentColor; opacity: .75 }
.chart .grid-line { stroke: currentColor; opacity: .13 }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .8rem }
.legend span { overflow-wrap: anywhere; min-width: 0 }
.legend i { display: inline-block; width: 1.1rem; height: 0; border-top: 3px solid; margin-right:
  .3rem; vertical-align: middle } .legend .dashed { border-top-style: dashed }
.legend .raw { opacity: .35; border-top-width: 2px }
"""
Kind = Literal["line", "raw", "dashed", "points"]
TEMPLATE = """\
<figure class="chart"><h3>{{ title }}</h3>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ title }}">
{% for y, label in y_ticks %}<line class="grid-line" x1="{{ left }}" x2="{{ right }}" y1="{{ y }}" \
y2="{{ y }}"/><text x="{{ left - 6 }}" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for x, label in x_ticks %}<text x="{{ x }}" y="{{ height - 8 }}" \
text-anchor="{{ 'end' if x > right - 12 else 'middle' }}">{{ label }}</text>
{% endfor %}
{% for path in paths %}{{ path }}{% endfor %}
</svg><div class="legend">{% for curve in curves if curve.label %}<span>\
<i class="{{ curve.kind }}" style="color:{{ colors[curve.color] }}"></i>{{ curve.label }}</span>\
{% endfor %}</div>{% if note %}<div class="soft">{{ note }}</div>{% endif %}</figure>"""
LINE = """\
<polyline points="{{ points }}" fill="none" stroke="{{ color }}" stroke-linejoin="round" \
stroke-width="{{ 1 if kind == 'raw' else 2 }}"{% if kind == 'raw' %} opacity="0.4"{% endif %}\
{% if kind == 'dashed' %} stroke-dasharray="6 4"{% endif %}/>"""
POINT = """\
<g stroke="{{ color }}" stroke-width="1.5">\
{% if low is not none %}<line x1="{{ x }}" x2="{{ x }}" y1="{{ low }}" y2="{{ high }}" \
opacity="0.55"/>{% endif %}<circle cx="{{ x }}" cy="{{ y }}" r="3" fill="{{ color }}">\
<title>{{ title }}</title></circle></g>"""


@dataclass(frozen=True)
class Curve:
    """A curve of (x, y) and, for "points", half the width of each one's interval.

    kind: "raw" is thin and does not set the axis alone: its outliers may leave the chart.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    kind: Kind = "line"
    half_width: Sequence[float] = ()


def smooth(values: Sequence[float]) -> list[float]:
    """Return the debiased exponential running mean, over about 5 % of the values."""
    keep = 1 - 1 / max(1.0, SMOOTHED_SHARE * len(values))
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        smoothed.append(mean / weight)
    return smoothed


def chart(
    title: str, curves: Sequence[Curve], *, from_zero: bool = False, note: str = ""
) -> Markup:
    """Draw curves that have any points into one chart; nothing where none has.

    from_zero: the vertical axis begins at 0.
    """
    curves = [_thinned(curve) for curve in curves if len(curve.x)]
    if not curves:
        return Markup()
    low, high = _limits(curves, from_zero=from_zero)
    y_ticks = ticks(low, high)
    x_low, x_high = min(min(c.x) for c in curves), max(max(c.x) for c in curves)
    frame = _Frame(x_low, max(x_high, x_low + 1), low, high)
    step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else 1.0
    return render_template(
        TEMPLATE,
        title=title,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        y_ticks=[(round(frame.y(tick), 1), number_text(tick, step=step)) for tick in y_ticks],
        x_ticks=[
            (round(frame.x(tick), 1), f"{tick:,.0f}") for tick in ticks(x_low, x_high, whole=True)
        ],
        paths=[path for curve in curves for path in _paths(curve, frame)],
        curves=curves,
        colors=COLORS,
        note=note,
    )


def ticks(low: float, high: float, *, num: int = 5, whole: bool = False) -> list[float]:
    """Return round numbers in [low, high], about `num` of them; whole: whole numbers."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def number_text(value: float, *, step: float) -> str:
    """Write an axis' number with the digits that tell it from the next, `step` away."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e6:
        return f"{value:.3g}"
    digits = next((d for d in range(12) if math.isclose(round(step, d), step, rel_tol=1e-6)), 12)
    return f"{value:,.{digits}f}"


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)


def _limits(curves: Sequence[Curve], *, from_zero: bool) -> tuple[float, float]:
    """Return the vertical range: all of each curve with its intervals, most of a raw one."""
    values: list[float] = []
    for curve in curves:
        if curve.kind == "raw":
            values += np.percentile(curve.y, [2, 98]).tolist()
            continue
        half = curve.half_width or [0.0] * len(curve.y)
        values += [y + sign * h for y, h in zip(curve.y, half, strict=True) for sign in (-1, 1)]
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (min(0.0, low) if from_zero or not (low or high) else low - pad), high + pad


def _thinned(curve: Curve) -> Curve:
    """Return means of neighbours where a curve has too many points to tell apart."""
    if len(curve.x) <= MAX_POINTS or curve.half_width:
        return curve
    groups = np.array_split(np.arange(len(curve.x)), MAX_POINTS)
    x, y = (
        [float(np.asarray(values)[group].mean()) for group in groups]
        for values in (curve.x, curve.y)
    )
    return Curve(curve.label, x, y, curve.color, curve.kind)


def _paths(curve: Curve, frame: _Frame) -> Iterable[Markup]:
    color = COLORS[curve.color % len(COLORS)]
    places = [(frame.x(x), frame.y(y)) for x, y in zip(curve.x, curve.y, strict=True)]
    if len(places) > 1:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield render_template(LINE, points=points, color=color, kind=curve.kind)
    if curve.kind != "points" and len(places) > 1:
        return
    for k, (x, y) in enumerate(places):
        half = curve.half_width[k] if curve.half_width else None
        value = f"{curve.label}, step {curve.x[k]:,.0f}: {curve.y[k]:.4g}"
        yield render_template(
            POINT,
            color=color,
            x=f"{x:.1f}",
            y=f"{y:.1f}",
            low=None if half is None else f"{frame.y(curve.y[k] - half):.1f}",
            high=None if half is None else f"{frame.y(curve.y[k] + half):.1f}",
            title=value if half is None else f"{value} ± {half:.2g}",
        )
