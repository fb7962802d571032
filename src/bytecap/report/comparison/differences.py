"""Paired differences to the first method, budget by budget."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.report.comparison import NAMES, styles
from bytecap.report.frame import identifier, plus_minus, table
from bytecap.report.svg import forest

ORDER = 30


def section(found: Mapping[str, Any]) -> str:
    """A chart of differences and their table, for every model."""
    return "\n".join(_model(m) for m in found["models"] if any("against" in c["scores"]["mean"] for c in m["cells"]))


def _model(model: Mapping[str, Any]) -> str:
    first, style = model["methods"][0], styles(model)
    cells = [c for c in model["cells"] if "against" in c["scores"]["mean"]]
    cells.sort(key=lambda c: (c["budget_bytes"], style[c["method"]]))
    drawn = []
    for budget in sorted({c["budget_bytes"] for c in cells}):
        rows = [
            (c["method"], d["mean"], d["stderr"] or 0.0, style[c["method"]])
            for c in cells if c["budget_bytes"] == budget for d in [c["scores"]["mean"]["against"]["kl"]]
        ]  # fmt: skip
        title = f"KL minus that of {first} at {budget:,} bytes"
        drawn.append(forest(rows, title, f"{title}, nats per token, two standard errors"))
    rows_of = [
        [f"{c['budget_bytes']:,}", c["method"], text, NAMES[metric], plus_minus(d["mean"], d["stderr"], 5),
         plus_minus(d["documents"], None, 5), plus_minus(d["seeds"], None, 5)]
        for c in cells for text, s in c["scores"].items() for metric, d in s["against"].items()
    ]  # fmt: skip
    head = ("budget, bytes", "method", "text", "figure", f"minus {first}", "error of documents", "error of seeds")
    name = identifier("differences", model["model"])
    return (
        f"<h2>{escape(model['model'])}: differences to {escape(first)}</h2>"
        "<p>On the same tokens, document by document; "
        f"to the right of the line {escape(first)} is better.</p>{''.join(drawn)}"
        f"<details><summary>All differences as a table</summary>{table(head, rows_of, name=name)}</details>"
    )
