"""List every model at every budget, with the step at which it left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bytecap.report.choice import outcome
from bytecap.report.frame import plus_minus, table

ORDER = 2
HEAD = ("model", "cap", "parameters", "smallest file", "short fit", "whole fit", "original", "bytes", "KL", "outcome")


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return one row's texts, in the order of `HEAD`."""
    short, whole = row.get("short", {}), row.get("whole", {})
    scored = whole or short
    return [
        row["model"], f"{row['budget_bytes']:,}", *(_count(row.get(k)) for k in ("parameters", "floor_bytes")),
        plus_minus(short.get("bpb"), short.get("bpb_stderr")), plus_minus(whole.get("bpb"), whole.get("bpb_stderr")),
        plus_minus(scored.get("bpb_original", row.get("bpb_original")), None), _count(scored.get("file_bytes")),
        plus_minus(scored.get("kl_nats"), None), outcome(row),
    ]  # fmt: skip


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def section(found: Mapping[str, Any]) -> str:
    """Return the table."""
    rows = sorted(found["rows"], key=lambda r: r["budget_bytes"])
    caption = "Bits per byte on the same bytes; KL in nats per token of the model's own tokenizer"
    return "<h2>Every model</h2>" + table(HEAD, [cells(r) for r in rows], caption, name="models")
