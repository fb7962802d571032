"""The slope line, and where the next and the last kilobyte would go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bytecap.report.frame import table
from bytecap.report.svg import Series, chart, key

ORDER = 50


def section(found: Mapping[str, Any]) -> str:
    """Predicted distortion against bytes with the slope at the budget; units that a kilobyte more or less moves."""
    margin = found["report"].get("margin")
    if not margin:
        return "<h2>The slope</h2><p>This method has no slope: it does not weigh units against one another.</p>"
    slope, line = margin["slope_nats_per_byte"], margin["line"]
    budget = found["report"]["budget_bytes"]
    here = next(p["nats"] for p in line if p["bytes"] == 0)
    reach = [p["bytes"] for p in line if here - slope * p["bytes"] > 0]
    series = [
        Series("slope", [(budget + x, here - slope * x, 0.0) for x in (min(reach), max(reach))], -1),
        Series("plans", [(budget + p["bytes"], p["nats"], 0.0) for p in line], 0,
               tips=[f"{budget + p['bytes']:,.0f} bytes: predicted {p['nats']:.5f} nats per token" for p in line]),
    ]  # fmt: skip
    title = "predicted distortion of the best plan against file bytes, and the slope at the budget"
    drawn = chart(series, title, "file size, bytes", "predicted, nats per token", height=320, zero=False)
    return (
        f"<h2>The slope</h2><p>At {budget:,} bytes one more kilobyte buys {1000 * slope:.2e} nats per token. "
        f"{key(0, 'plans at other budgets')}{key(-1, 'slope')}</p>{drawn}"
        f"{_moves('Where the next 1,000 bytes would go', margin['next'])}"
        f"{_moves('Where the last 1,000 bytes went', margin['last'])}"
        "<p class=dim>As the allocator predicts it, before drift targets and trimming.</p>"
    )


def _moves(title: str, moves: Sequence[Mapping[str, Any]]) -> str:
    rows = [[m["unit"], f"{m['bytes']:+,.0f}", f"{-m['nats']:+.2e}"] for m in moves]
    if not rows:
        return f"<h3>{escape(title)}</h3><p>To no unit.</p>"
    head = ("unit", "bytes", "nats per token recovered")
    return f"<h3>{escape(title)}</h3>{table(head, rows, title)}"
