"""Where every model stood when bytes were spent on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bytecap.report.frame import table
from bytecap.report.thesis import interval, short

ORDER = 30


def section(found: Mapping[str, Any]) -> str:
    """One table."""
    rows = [
        [short(m["model"]), m["base"], m["recipe"] or "-", "registered" if m["counts"] else "exploration",
         *((f"{m['parameters']:,}", f"{m['budget_bytes']:,}", f"{m['matrix_bytes']:,}", interval(m["kl"]), f"{m['tokens']:,.0f}",
            ", ".join(m["texts"])) if "kl" in m else ("-", "-", "-", m["missing"], "-", "-"))]
        for m in found["models"]
    ]  # fmt: skip
    head = (
        "model",
        "base",
        "recipe",
        "counts as",
        "parameters",
        "file bytes",
        "matrix bytes",
        "KL at the base",
        "tokens",
        "texts",
    )
    return f"<h2>Operating points</h2>{table(head, rows, 'KL to the original in nats per token', name='operating')}"
