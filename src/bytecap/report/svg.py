"""Draw charts as inline SVG: axes with round ticks, error bars, a marker and a dash for each series.

Every chart is drawn twice, for broad and for narrow screens; the page's style sheet shows one of the two, so that text
keeps its size and nothing has to be scrolled sideways.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart under all common colour blindness; markers
and dashes carry the same distinction without colour. Guides (the lambda line, an envelope) are grey and dotted. On
dark paper the darkest of them are lighter.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#666666")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 2 2")
DARK = {"#0072B2": "#3B9BD9", "#D55E00": "#E8762B", "#7F3C8D": "#B98AC6", "#666666": "#A3A3A3"}  # on dark paper
BROAD, SLIM = 760, 380  # widths that charts are drawn for
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 36, 10, 30
_GLYPH, _LINE = 7.4, 18  # wide and high: text of 13 px in the widest of the usual fonts
_LABEL = 42  # characters of a row's name in a forest


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the legend and for readers of the markup.
        points: (x, y, standard error of y).
        style: index of its colour, marker and dash; negative is a guide.
        line: join the points.
        tips: exact figures of every point, shown on hover and focus.
        band: draw two standard errors as a band instead of bars of one.
    """

    name: str
    points: Sequence[tuple[float, float, float]]
    style: int
    line: bool = True
    tips: Sequence[str] = ()
    band: bool = False


@dataclass(frozen=True)
class Mark:
    """A place on the horizontal axis, marked by a line from the upper edge and described by `tip`."""

    x: float
    tip: str
    style: int


@dataclass(frozen=True)
class Axis:
    """A range with its ticks, linear or logarithmic."""

    ticks: Sequence[float]
    log: bool = False

    def place(self, value: float) -> float:
        """Return a value's place from 0, the first tick, to 1, the last."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            return (math.log(max(value, 1e-3 * low)) - math.log(low)) / (math.log(high) - math.log(low))
        return (value - low) / (high - low)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return round numbers that cover a range.

    >>> ticks(0, 10)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    rough = max(high - low, 1e-30) / max(1, count - 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten that cover a positive range.

    >>> log_ticks(0.03, 0.4)
    [0.02, 0.05, 0.1, 0.2, 0.5]
    """
    steps = [float(f"{m}e{e}") for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
             for m in (1, 2, 5)]  # fmt: skip
    first = max(s for s in steps if s <= low)
    last = min((s for s in steps if s >= high), default=steps[-1])
    return [s for s in steps if first <= s <= max(last, steps[steps.index(first) + 1])]


def colour(style: int) -> str:
    """Return the colour of a series by its number."""
    return "#888888" if style < 0 else COLOURS[style % len(COLOURS)]


def marker(style: int, x: float, y: float) -> str:
    """Draw a marker at a place: circle, square, triangle or diamond, in turn."""
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


def tipped(inside: str, tip: str, first: bool) -> str:
    """Draw a mark with its figures, which pointer, tab and arrow keys reach and screen readers read."""
    text = escape(tip)
    return (
        f'<g class="mark" role="img" tabindex="{0 if first else -1}" aria-label="{text}" data-tip="{text}">'
        f"<title>{text}</title>{inside}</g>"
    )


def figures(draw: Callable[[int], str]) -> str:
    """Return a chart for broad and for narrow screens, of which one is shown."""
    return f'<figure class="broad">{draw(BROAD)}</figure><figure class="slim">{draw(SLIM)}</figure>'


def _lines(text: str, width: float) -> list[str]:
    """Break text to a width in pixels."""
    return textwrap.wrap(text, max(8, int(width / _GLYPH))) or [""]


def _written(lines: Sequence[str], x: float, y: float, anchor: str) -> list[str]:
    return [f'<text x="{x:.0f}" y="{y + _LINE * i:.0f}" text-anchor="{anchor}">{escape(line)}</text>'
            for i, line in enumerate(lines)]  # fmt: skip


def axes(
    series: Sequence[Series], *, log: bool, zero: bool, count: int = 6, near: bool = False, wide: bool = False
) -> tuple[Axis, Axis]:
    """Return axes that hold all points and error bars, with about `count` ticks on the horizontal one; see `chart`."""
    points = [p for s in series for p in s.points]
    start = [0.0] if zero else []
    xs = start + [p[0] for p in points] or [0.0]
    across = Axis(ticks(min(xs), max([1e-9 if zero else min(xs) + 1e-9, *xs]), count))
    if wide and min(xs) > 0:
        across = Axis(log_ticks(min(xs), max(xs)), True)
    if log:
        values = [p[1] for p in points if p[1] > 0] or [1.0]
        tops = [p[1] + p[2] for p in points if p[1] > 0] or [1.0]
        return across, Axis(log_ticks(min(values), max(tops)), True)
    reach = [(y, e * (1 + s.band)) for s in series for _, y, e in s.points]
    start = [] if near and reach else [0.0]
    lows, highs = [*start, *(y - e for y, e in reach)], [1e-12, *(y + e for y, e in reach)]
    return across, Axis(ticks(min(lows), max(highs)))


def chart(
    series: Sequence[Series], title: str, across: str, up: str, *, height: int = 380, log: bool = False,
    zero: bool = True, near: bool = False, wide: bool = False, marks: Sequence[Mark] = (),
) -> str:  # fmt: skip
    """Draw a chart with a title for screen readers, as figures of a page.

    Args:
        series: lines, drawn in order.
        title: what it shows.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        height: in pixels, without labels; at most 260 where it is narrow.
        log: logarithmic vertical axis; values that are not positive lie on its lower edge.
        zero: the horizontal axis begins at zero.
        near: the vertical axis begins below the smallest value instead of at zero.
        wide: logarithmic horizontal axis, for positive values; `zero` must be off.
        marks: places on the horizontal axis.
    """

    def draw(width: int) -> str:
        slim = width < BROAD
        xs, ys = axes(series, log=log, zero=zero, count=3 if slim else 6, near=near, wide=wide)
        above, below = _lines(up, width - 8), _lines(across, width - _LEFT)
        top = _TOP + _LINE * len(above)
        bottom = top + (min(height, 260) if slim else height) - 64

        def at(x: float, y: float) -> tuple[float, float]:
            right = _LEFT + xs.place(x) * (width - _LEFT - _RIGHT)
            return right, bottom - min(1.0, max(0.0, ys.place(y))) * (bottom - top)

        whole = bottom + _BOTTOM + _LINE * len(below)
        name, middle = escape(title), (width + _LEFT - _RIGHT) / 2
        parts = [f'<svg viewBox="0 0 {width} {whole}" role="group" aria-label="{name}"><title>{name}</title>']
        for x in xs.ticks:
            px = at(x, ys.ticks[0])[0]
            parts.append(f'<line class="grid" x1="{px:.1f}" y1="{top:.1f}" x2="{px:.1f}" y2="{bottom:.1f}"/>')
            parts.append(f'<text x="{px:.1f}" y="{bottom + 19:.1f}" text-anchor="middle">{x:,.12g}</text>')
        for y in ys.ticks:
            py = at(xs.ticks[0], y)[1]
            parts.append(f'<line class="grid" x1="{_LEFT}" y1="{py:.1f}" x2="{width - _RIGHT}" y2="{py:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.4g}</text>')
        parts += _written(above, 4, 14, "start") + _written(below, middle, bottom + 41, "middle")
        for s in series:
            bars = 1 + s.band
            parts += _draw(s, [(*at(x, y), at(x, y - bars * e)[1], at(x, y + bars * e)[1]) for x, y, e in s.points])
        parts += [_marked(m, at(m.x, 0.0)[0], top, i == 0) for i, m in enumerate(marks)]
        return "\n".join([*parts, "</svg>"])

    return figures(draw)


def _marked(mark: Mark, x: float, top: float, first: bool) -> str:
    line = (
        f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + 26}" stroke="{colour(mark.style)}" stroke-width="2"/>'
    )
    return tipped(line + marker(mark.style, x, top + 3), mark.tip, first)


def _draw(series: Series, points: Sequence[tuple[float, float, float, float]]) -> list[str]:
    """Draw one series from places in pixels: x, y, and both ends of the error bar."""
    ink = colour(series.style)
    dash = "2 4" if series.style < 0 else _DASHES[series.style % len(_DASHES)]
    parts = [f'<g class="{"guide" if series.style < 0 else "curve"}" data-path="{escape(series.name)}">']
    if series.band:
        edge = [(x, low) for x, _, low, _ in points] + [(x, high) for x, _, _, high in reversed(points)]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
        parts.append(f'<polygon class="band" points="{corners}" fill="{ink}" fill-opacity="0.16"/>')
    if series.line:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        parts.append(f'<polyline points="{line}" stroke="{ink}" stroke-dasharray="{dash}"/>')
    for i, (x, y, low, high) in enumerate(points):
        if low - high > 1 and not series.band:
            parts.append(f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke="{ink}"/>')
        if series.style >= 0:
            mark = marker(series.style, x, y)
            parts.append(tipped(mark, series.tips[i], i == 0) if series.tips else mark)
    return [*parts, "</g>"]


def forest(rows: Sequence[tuple[str, float, float, int]], title: str, across: str, *, line: float = 0.0) -> str:
    """Draw means with bars of two standard errors, one below the other, against a line.

    Args:
        rows: (label, mean, standard error, style).
        title: what it shows.
        across: label of the axis.
        line: where the vertical line stands.
    """
    names = [n if len(n) <= _LABEL else n[: _LABEL - 1] + "…" for n, *_ in rows]
    lows, highs = [line, *(m - 2 * e for _, m, e, _ in rows)], [line, *(m + 2 * e for _, m, e, _ in rows)]

    def draw(width: int) -> str:
        slim = width < BROAD  # names stand above their bars
        axis, step, start = Axis(ticks(min(lows), max(highs), 3 if slim else 5)), 40 if slim else 22, 34 if slim else 16
        edge = _GLYPH * len(f"{axis.ticks[0]:.4g}") / 2 + 2  # half of what stands below the first tick
        left = max(16.0, edge) if slim else 20 + _GLYPH * max(map(len, names))
        bottom, below, name = step * len(rows) + 8, _lines(across, width), escape(title)

        def at(x: float) -> float:
            return left + axis.place(x) * (width - left - _RIGHT)

        whole = bottom + _BOTTOM + _LINE * len(below)
        parts = [f'<svg viewBox="0 0 {width} {whole}" role="group" aria-label="{name}"><title>{name}</title>']
        for x in axis.ticks:
            parts.append(f'<line class="grid" x1="{at(x):.1f}" y1="4" x2="{at(x):.1f}" y2="{bottom}"/>')
            parts.append(f'<text x="{at(x):.1f}" y="{bottom + 19}" text-anchor="middle">{x:.4g}</text>')
        parts.append(f'<line x1="{at(line):.1f}" y1="0" x2="{at(line):.1f}" y2="{bottom}" stroke="#888888" '
                     'stroke-width="2" stroke-dasharray="2 3"/>')  # fmt: skip
        for i, (label, mean, error, style) in enumerate(rows):
            y = start + step * i
            drawn = (
                f'<line x1="{at(mean - 2 * error):.1f}" y1="{y}" x2="{at(mean + 2 * error):.1f}" y2="{y}" '
                f'stroke="{colour(style)}" stroke-width="2"/>{marker(style, at(mean), y)}'
            )
            parts += _written([names[i]], 4, y - 13, "start") if slim else _written([names[i]], left - 10, y + 4, "end")
            parts.append(tipped(drawn, f"{label}: {mean:.5g} ± {error:.2g}", i == 0))
        return "\n".join([*parts, *_written(below, width / 2, bottom + 41, "middle"), "</svg>"])

    return figures(draw)


def bar(parts: Sequence[tuple[int, float, str]], whole: float, label: str, *, first: bool = True) -> str:
    """Draw a bar of parts (style, size, tip) on a scale that ends at `whole`."""
    at, marks = 0.0, []
    for i, (style, size, tip) in enumerate(parts):
        wide = 1000 * size / max(whole, 1e-30)
        rect = f'<rect x="{at:.2f}" y="0" width="{wide:.2f}" height="18" fill="{colour(style)}"/>'
        marks.append(tipped(rect, tip, first and i == 0))
        at += wide
    return (
        f'<svg class="bar" viewBox="0 0 1000 18" preserveAspectRatio="none" role="group" aria-label="{escape(label)}">'
        f"{''.join(marks)}</svg>"
    )


def spark(
    points: Sequence[tuple[float, float]], reach: tuple[float, float], style: int, label: str, *, slope: float = 0.0
) -> str:  # fmt: skip
    """Draw a small curve from (0, 0) for a table's cell, without axes, with a dotted line of a slope.

    Args:
        points: (x, y), rising in x.
        reach: the values at the right and the upper edge.
        style: of the curve.
        label: what it shows.
        slope: of the dotted line.
    """
    wide, high = 96, 28

    def at(x: float, y: float) -> str:
        return f"{2 + wide * x / reach[0]:.1f},{2 + high * (1 - min(1.0, y / reach[1])):.1f}"

    end = min(reach[0], reach[1] / slope) if slope > 0 else 0.0
    guide = f'<polyline points="{at(0, 0)} {at(end, slope * end)}" stroke="#888888" stroke-dasharray="2 3"/>'
    return (
        f'<svg class="spark" width="{wide + 4}" height="{high + 4}" role="img" aria-label="{escape(label)}">'
        f'{guide if end > 0 else ""}<polyline points="{" ".join(at(x, y) for x, y in points)}" '
        f'stroke="{colour(style)}"/></svg>'
    )


def key(style: int, name: str) -> str:
    """Draw a legend entry."""
    dash = "2 4" if style < 0 else _DASHES[style % len(_DASHES)]
    mark = marker(style, 16, 7) if style >= 0 else ""
    return (
        f'<span class="key"><svg width="32" height="14" aria-hidden="true"><line x1="0" y1="7" x2="32" y2="7" '
        f'stroke="{colour(style)}" stroke-width="2" stroke-dasharray="{dash}"/>{mark}</svg> {escape(name)}</span>'
    )


def swatch(style: int, name: str) -> str:
    """Draw a legend entry of a bar's part."""
    return (
        f'<span class="key"><svg width="14" height="14" aria-hidden="true"><rect width="14" height="14" '
        f'fill="{colour(style)}"/></svg> {escape(name)}</span>'
    )
