"""Scores on tasks beside KL: a chart of differences to the original for every task, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bytecap.report.comparison import styles
from bytecap.report.frame import identifier, plus_minus, table
from bytecap.report.svg import Series, chart, key

ORDER = 35
_CAPTION = (
    "Means over questions, with their standard errors; of perplexity the mean log likelihood in nats, so more is better"
)


def section(found: Mapping[str, Any]) -> str:
    """One chart for each task and one table for each model that was asked."""
    return "\n".join(_model(m) for m in found["models"] if any(c.get("tasks") for c in m["cells"]))


def _model(model: Mapping[str, Any]) -> str:
    style = styles(model)
    cells = sorted((c for c in model["cells"] if c.get("tasks")), key=lambda c: (c["budget_bytes"], style[c["method"]]))
    rows = [
        [f"{c['budget_bytes']:,}", c["method"], plus_minus(kl["mean"], kl["stderr"]), task, f"{t['questions']:,}",
         plus_minus(t["mean"], t["stderr"]), plus_minus(t.get("original"), None), _difference(t)]
        for c in cells for kl in [c["scores"]["mean"]["kl"]] for task, t in c["tasks"].items()
    ]  # fmt: skip
    head = ("budget, bytes", "method", "KL", "task", "questions", "score", "original", "minus original")
    names = list(dict.fromkeys(t for c in cells for t in c["tasks"]))
    legend = "".join(key(i, n) for n, i in style.items() if any(c["method"] == n for c in cells)) + key(-1, "original")
    drawn = "".join(_chart(model, cells, task) for task in names)
    return (
        f"<h2>{escape(model['model'])}: tasks</h2><p>Differences to the original are taken question by question, and "
        f"are therefore much surer than the scores; whiskers are one standard error.</p><p>{legend}</p>{drawn}"
        + table(head, rows, _CAPTION, name=identifier("tasks", model["model"]))
    )


def _difference(score: Mapping[str, Any]) -> str:
    found = score.get("difference") or {}
    return plus_minus(found.get("mean"), found.get("stderr"))


def _chart(model: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], task: str) -> str:
    """Draw a task's differences against bytes; nothing where none could be paired."""
    series = []
    for name, style in styles(model).items():
        mine = [(c, d) for c in cells if c["method"] == name for d in [c["tasks"].get(task, {}).get("difference")] if d]
        mine.sort(key=lambda pair: float(pair[0]["file_bytes"]))
        points = [(c["file_bytes"], d["mean"], d["stderr"] or 0.0) for c, d in mine]
        tips = [
            f"{name}, {c['file_bytes']:,.0f} bytes: {task} {_difference(c['tasks'][task])} against the original, KL "
            f"{plus_minus(c['scores']['mean']['kl']['mean'], c['scores']['mean']['kl']['stderr'])}"
            for c, _ in mine
        ]
        if points:
            series.append(Series(name, points, style, tips=tips))
    if not series:
        return ""
    sizes = [p[0] for s in series for p in s.points]
    series.insert(0, Series("original", [(x, 0.0, 0.0) for x in (min(sizes), max(sizes))], -1))
    across, up = "file size, bytes (everything counted)", f"{task}, minus the original"
    title = f"{up}, against file bytes ({model['model']})"
    return f"<h3>{escape(task)}</h3>" + chart(series, title, across, up, height=260, zero=False, near=True)
