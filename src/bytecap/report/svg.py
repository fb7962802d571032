"""Small line charts as inline SVG: axes with round ticks, error bars, one marker and one dash for each series.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart under all common colour blindness; markers
and dashes carry the same distinction without colour. The `lambda` line is grey and dotted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#666666")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 2 2")
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 16, 16, 48


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the legend and for readers of the markup.
        points: (x, y, standard error of y).
        style: index of its colour, marker and dash; negative is the lambda line.
        line: join the points.
    """

    name: str
    points: Sequence[tuple[float, float, float]]
    style: int
    line: bool = True


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers that cover a range.

    >>> ticks(0, 10)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    rough = max(high - low, 1e-30) / max(1, count - 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def colour(style: int) -> str:
    """Of a series."""
    return "#888888" if style < 0 else COLOURS[style % len(COLOURS)]


def marker(style: int, x: float, y: float) -> str:
    """A marker at a place: circle, square, triangle, diamond, in turn."""
    fill = f'fill="{colour(style)}"'
    shape = style % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" {fill}/>'
    corners = {
        1: ((-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)),
        2: ((0, -4.4), (4.2, 3.4), (-4.2, 3.4)),
        3: ((0, -4.8), (4.4, 0), (0, 4.8), (-4.4, 0)),
    }[shape]
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}" {fill}/>'


def chart(series: Sequence[Series], title: str, across: str, up: str, *, width: int = 760, height: int = 380) -> str:
    """A chart with a title for screen readers.

    Args:
        series: lines, drawn in order.
        title: what it shows.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        width: in pixels.
        height: in pixels.
    """
    points = [p for s in series for p in s.points]
    xs = ticks(min([0.0, *(p[0] for p in points)]), max([1e-9, *(p[0] for p in points)]))
    ys = ticks(min([0.0, *(p[1] - p[2] for p in points)]), max([1e-12, *(p[1] + p[2] for p in points)]))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (width - _LEFT - _RIGHT),
            height - _BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (height - _TOP - _BOTTOM),
        )

    name, middle = escape(title), (height - _BOTTOM) / 2
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}"><title>{name}</title>']
    for x in xs:
        px, top, bottom = at(x, 0)[0], at(0, ys[-1])[1], at(0, ys[0])[1]
        parts.append(f'<line class="grid" x1="{px:.1f}" y1="{top:.1f}" x2="{px:.1f}" y2="{bottom:.1f}"/>')
        parts.append(f'<text x="{px:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{x:,.6g}</text>')
    for y in ys:
        py = at(0, y)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{py:.1f}" x2="{width - _RIGHT}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    parts.append(f'<text x="{(width + _LEFT) / 2:.0f}" y="{height - 8}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(up)}</text>')
    for s in series:
        parts += _draw(s, [(*at(x, y), abs(at(x, y + e)[1] - at(x, y)[1])) for x, y, e in s.points])
    return "\n".join([*parts, "</svg>"])


def _draw(series: Series, points: Sequence[tuple[float, float, float]]) -> list[str]:
    """Markup of one series at pixel places."""
    ink = colour(series.style)
    dash = "2 4" if series.style < 0 else _DASHES[series.style % len(_DASHES)]
    parts = [f'<g class="{"lambda" if series.style < 0 else "curve"}" data-path="{escape(series.name)}">']
    if series.line:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        parts.append(f'<polyline points="{line}" stroke="{ink}" stroke-dasharray="{dash}"/>')
    for x, y, error in points:
        if error > 0.5:
            parts.append(f'<line x1="{x:.1f}" y1="{y - error:.1f}" x2="{x:.1f}" y2="{y + error:.1f}" stroke="{ink}"/>')
        if series.style >= 0:
            parts.append(marker(series.style, x, y))
    return [*parts, "</g>"]


def key(style: int, name: str) -> str:
    """A legend entry."""
    dash = "2 4" if style < 0 else _DASHES[style % len(_DASHES)]
    mark = marker(style, 16, 7) if style >= 0 else ""
    return (
        f'<span class="key"><svg width="32" height="14" aria-hidden="true"><line x1="0" y1="7" x2="32" y2="7" '
        f'stroke="{colour(style)}" stroke-width="2" stroke-dasharray="{dash}"/>{mark}</svg> {escape(name)}</span>'
    )
