"""Show the operating point of every model before bytes were spent on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bytecap.report.frame import table
from bytecap.report.thesis import interval, short

ORDER = 30


def section(found: Mapping[str, Any]) -> str:
    """One table."""
    rows = [_row(m) for m in found["models"]]
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


def _row(m: Mapping[str, Any]) -> list[str]:
    name = [short(m["model"]), m["base"], m["recipe"] or "-", "registered" if m["counts"] else "exploration"]
    if "kl" not in m:
        return [*name, "-", "-", "-", m["missing"], "-", "-"]
    sizes = [f"{m[k]:,}" for k in ("parameters", "budget_bytes", "matrix_bytes")]
    return [*name, *sizes, interval(m["kl"]), f"{m['tokens']:,.0f}", ", ".join(m["texts"])]
