"""Bytes saved at equal quality, every method against every other one and against the envelope of all others."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.report.comparison import NAMES
from bytecap.report.frame import identifier, table

ORDER = 40


def section(found: Mapping[str, Any]) -> str:
    """One table for each model."""
    return "\n".join(_model(m) for m in found["models"] if m["saved"])


def _model(model: Mapping[str, Any]) -> str:
    rows = [
        [x["method"], x["against"], NAMES[x["metric"]], f"{100 * x['mean']:.2f}%", f"{100 * (x['stderr'] or 0):.2f}%",
         "; ".join(f"{p['bytes']:,.0f} for {p['others_bytes']:,.0f}" for p in x["points"])]
        for x in model["saved"]
    ]  # fmt: skip
    head = ("method", "against", "at equal", "bytes saved", "standard error", "bytes for bytes of the other, by point")
    name = identifier("saved", model["model"])
    caption = "Read off the other's lower envelope, linear in the logarithm; nothing beyond its ends"
    return f"<h2>{escape(model['model'])}: bytes saved</h2>{table(head, rows, caption, name=name)}"
