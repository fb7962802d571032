"""Effects of every experiment against its threshold: groups first, then each model on each base."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.report.frame import identifier, table
from bytecap.report.svg import forest
from bytecap.report.thesis import SIGNS, STYLES, interval, short

ORDER = 20


def section(found: Mapping[str, Any]) -> str:
    """One part for each experiment."""
    return "\n".join(_experiment(e) for e in found["experiments"])


def _experiment(e: Mapping[str, Any]) -> str:
    groups = [
        (f"{g['recipe']}, {g['models']} model{'s' * (g['models'] != 1)}, {g['base']}", True, g) for g in e["groups"]
    ]
    cells = [(f"{short(c['model'])}, {c['base']}", c["counts"], c) for c in e["cells"] if c["applies"]]
    main = e["main"]
    drawn = [
        (label, m["effect"], max(m["high"] - m["effect"], m["effect"] - m["low"]) / 2, STYLES[row["verdict"]])
        for label, _, row in (*groups, *cells) if main in row["effects"] for m in [row["effects"][main]]
    ]  # fmt: skip
    title = f"Experiment {e['number']}: {main}"
    across = f"{main} with its 95% interval (the wider side on both); the line is the threshold {e['line']:g}"
    figure = forest(drawn, title, across, line=e["line"]) if drawn else ""
    rows = [
        [label, "registered" if counted else "exploration", SIGNS[row["verdict"]], name,
         interval(effect), f"{effect['detectable']:.3f}", row["reason"]]
        for label, counted, row in (*groups, *cells)
        for name, effect in (row["effects"] or {"-": None}).items() if effect
    ] + [
        [label, "registered" if counted else "exploration", SIGNS[row["verdict"]], "-", "-", "-", row["reason"]]
        for label, counted, row in (*groups, *cells) if not row["effects"]
    ]  # fmt: skip
    head = ("who", "counts as", "verdict", "figure", "effect, 95% interval", "smallest detectable", "reason")
    name = identifier("effects", e["name"])
    said = f"({e['kind']}) {e['statistic'][0].upper()}{e['statistic'][1:]}."
    return (
        f"<h2>{e['number']} {escape(e['title'])}: {SIGNS[e['verdict']]}</h2><p>{escape(e['hypothesis'])} "
        f'<span class="dim">{escape(said)}</span></p>{figure}'
        f"<details><summary>Figures</summary>{table(head, rows, name=name)}</details>{_details(e)}"
    )


def _details(e: Mapping[str, Any]) -> str:
    rows = [[short(c["model"]), c["base"], *row] for c in e["cells"] for row in c["details"]]
    if not rows:
        return ""
    shown = table(("model", "base", "what", "figure"), rows, name=identifier("details", e["name"]))
    return f"<details><summary>More</summary>{shown}</details>"
