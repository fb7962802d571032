"""Every cell in figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bytecap.report.frame import plus_minus, table

ORDER = 50


def section(found: Mapping[str, Any]) -> str:
    """One table of all models."""
    rows = [
        [m["model"], c["method"], f"{c['budget_bytes']:,}", f"{c['file_bytes']:,.0f}", f"{c['bits_per_parameter']:.3f}",
         text, *(plus_minus(s[k]["mean"], s[k]["stderr"]) for k in ("kl", "loss")),
         "-" if c["predicted_delta_nats"] is None else f"{c['predicted_delta_nats']:.4f}",
         "-" if c["cpu_seconds"] is None else f"{c['cpu_seconds']:.1f}"]
        for m in found["models"] for c in m["cells"] for text, s in c["scores"].items()
    ]  # fmt: skip
    head = ("model", "method", "budget", "file bytes", "bits/parameter", "text", "KL", "loss increase", "predicted KL",
            "CPU seconds")  # fmt: skip
    return f"<h2>All runs</h2>{table(head, rows, 'Nats per token; means over calibration seeds', name='all')}"
