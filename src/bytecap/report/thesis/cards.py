"""One card for each experiment: verdict, hypothesis and a picture first; reasons and figures are folded behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bytecap.report.svg import colour, marker, tipped
from bytecap.report.thesis import SIGNS, STYLES, interval

ORDER = 10
_WIDTH, _ROW, _EDGE = 240, 18, 12  # pixels of a picture


def section(found: Mapping[str, Any]) -> str:
    """State the thesis, and show one card for each experiment."""
    items = "".join(map(_card, found["experiments"]))
    return (
        "<p><em>Once models are in the aggressive low-bit regime, the next gains come from better byte-return ranking "
        "and budgeting, not from globally lowering quantization error.</em></p><p>Hypotheses, statistics, thresholds "
        "and rules were registered in docs/thesis.md before the first run; cards hold only what was measured on models "
        "trained after that. Supported always speaks for the thesis.</p><h2>Verdicts</h2>"
        f'<ul class="cards verdicts">{items}</ul>'
    )


def _card(experiment: Mapping[str, Any]) -> str:
    title = f"{experiment['number']} {experiment['title']} ({experiment['kind']})"
    main, groups = experiment["main"], [g for g in experiment["groups"] if experiment["main"] in g["effects"]]
    why = [f"<p>{escape(experiment['reason'])}.</p>"] if experiment["reason"] else []
    rows = "".join(
        f"<li>{escape(g['recipe'])} on {escape(g['base'])}: {SIGNS[g['verdict']]}, {interval(g['effects'][main])}</li>"
        for g in groups
    )
    why += [f"<p>{escape(main)}, with its 95% interval:</p><ul>{rows}</ul>"] if rows else []
    return (
        f"<li>{escape(title)}<b>{SIGNS[experiment['verdict']]}</b><p>{escape(experiment['hypothesis'])}</p>"
        f"{_picture(groups, main, experiment['line'])}"
        f"<details><summary>Why</summary>{''.join(why) or '<p>There is no group of models.</p>'}</details></li>"
    )


def _picture(groups: Sequence[Mapping[str, Any]], main: str, line: float) -> str:
    """The groups' intervals against the threshold; nothing where no group has one."""
    if not groups:
        return ""
    effects: list[dict[str, float]] = [g["effects"][main] for g in groups]
    ends = [line, *(e["low"] for e in effects), *(e["high"] for e in effects)]
    low, reach = min(ends), max(max(ends) - min(ends), 1e-12)

    def at(value: float) -> float:
        return _EDGE + (_WIDTH - 2 * _EDGE) * (value - low) / reach

    high = _ROW * len(groups) + 8
    dots = 'stroke="#888888" stroke-width="2" stroke-dasharray="2 3"'
    parts = [f'<line x1="{at(line):.1f}" y1="0" x2="{at(line):.1f}" y2="{high}" {dots}/>']
    for i, (group, effect) in enumerate(zip(groups, effects, strict=True)):
        y, style = 4 + _ROW * i + _ROW / 2, STYLES[group["verdict"]]
        bar = (
            f'<line x1="{at(effect["low"]):.1f}" y1="{y}" x2="{at(effect["high"]):.1f}" y2="{y}" '
            f'stroke="{colour(style)}" stroke-width="2"/>{marker(style, at(effect["effect"]), y)}'
        )
        parts.append(tipped(bar, f"{group['recipe']} on {group['base']}: {main} {interval(effect)}", i == 0))
    label = escape(f"{main} with its 95% interval; the line is the threshold {line:g}")
    return (
        f'<svg class="strip" viewBox="0 0 {_WIDTH} {high}" role="group" aria-label="{label}"><title>{label}</title>'
        f"{''.join(parts)}</svg>"
    )
