"""Show which method wins at which budget, and how many bytes that is worth."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.report.comparison import NAMES, winner
from bytecap.report.frame import cards, identifier, plus_minus, table

ORDER = 10


def section(found: Mapping[str, Any]) -> str:
    """Cards and the table of wins of every model."""
    return "\n".join(_model(m) for m in found["models"] if m["cells"])


def _model(model: Mapping[str, Any]) -> str:
    items = [
        (f"{x['method']} against {x['against']}", f"{100 * x['mean']:.1f}% of the bytes saved",
         f"± {100 * (x['stderr'] or 0):.1f}, at equal KL, over {len(x['points'])} point{'s' * (len(x['points']) != 1)}")
        for x in model["saved"] if x["metric"] == "kl" and x["method"] == model["methods"][0]
    ]  # fmt: skip
    rows = [
        [f"{w['budget_bytes']:,}", w["text"], NAMES[w["metric"]], winner(w), w["second"],
         plus_minus(w["difference"]["mean"], w["difference"]["stderr"], 5)]
        for w in model["wins"]
    ]  # fmt: skip
    texts = "; ".join(
        f"{t['name']}: {t['tokens']:,} tokens, errors over {t['clusters']} {t['errors_over']}" for t in model["texts"]
    )
    refused = "".join(dict.fromkeys(
        f"<p>{escape(r['method'])} cannot get below {r['floor_bytes']:,} bytes: no run at {r['budget_bytes']:,}.</p>"
        for r in model["refused"]
    ))  # fmt: skip
    head = ("budget, bytes", "text", "figure", "best", "second", "second minus best, nats per token")
    name = identifier("wins", model["model"])
    return (
        f"<h2>{escape(model['model'])}: who wins where</h2><p>{model['parameters']:,} parameters; calibration seeds "
        f"{', '.join(map(str, model['seeds']))}; {escape(texts)}.</p>{cards(items)}"
        + table(head, rows, "Ties are within one standard error of the paired difference", name=name) + refused
    )  # fmt: skip
