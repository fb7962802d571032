"""Every byte by owner and kind: stacked bars and exact numbers in one table."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.format.ledger import KINDS, by_unit, total
from bytecap.report.fit import style
from bytecap.report.frame import table
from bytecap.report.svg import bar

ORDER = 20


def section(found: Mapping[str, Any]) -> str:
    """One row for every owner, largest first."""
    lines = by_unit(found["ledger"])
    if not lines:
        return ""
    size, largest = total(found["ledger"]), max(line.bytes for line in lines)
    rows = []
    for i, line in enumerate(lines):
        order = sorted(line.kinds.items(), key=lambda kn: KINDS.index(kn[0].rpartition(" ")[2]))
        parts = [(style(k), float(n), f"{line.unit}: {k} {n:,} bytes") for k, n in order]
        drawn = bar(parts, largest, f"{line.unit}: {line.bytes:,} bytes", first=i == 0)
        bits = f"{8 * line.bytes / line.parameters:.3f}" if line.parameters else ""
        words = ", ".join(f"{kind} {n:,}" for kind, n in order)
        rows.append([
            line.unit, f"<td class=bars data-value={line.bytes}>{drawn}</td>", f"{line.bytes:,}",
            f"{100 * line.bytes / size:.2f}%", f"{line.parameters:,}", bits, f"<td class=words>{escape(words)}</td>",
        ])  # fmt: skip
    head = ("owner", "bytes by kind", "bytes", "share", "parameters", "bits/parameter", "kinds")
    body = table(head, rows, f"All {size:,} bytes of the file", name="owners", raw=(1, 6))
    return f"<h2>Every byte by owner</h2><div data-group>{body}</div><p class=dim>{escape(_HOW)}</p>"


_HOW = "Hover, tap or tab into a bar for exact numbers; arrow keys go on. Titles sort."
