"""Print a choice among models on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from bytecap.escape import console, shown, styled
from bytecap.report.choice.every import HEAD, cells
from bytecap.sizes import format_size

_WIDE = 160  # columns where there is no terminal to ask
_LONGEST = 300  # characters of a reason


def print_choice(found: Mapping[str, Any]) -> None:
    """Print every model at every budget, and the best at the cap."""
    out = console()
    if not out.is_terminal:
        out = console(width=_WIDE)
    table = Table(box=None, pad_edge=False)
    for title in HEAD:
        table.add_column(title, justify="left" if title in {"model", "outcome"} else "right")
    for row in sorted(found["rows"], key=lambda r: r["budget_bytes"]):
        table.add_row(*(shown(c, most=_LONGEST) for c in cells(row)))
    out.print(table, highlight=False)
    score = f"{found['bpb']:.4f} ± {found['bpb_stderr']:.4f} bits per byte on {found['evaluation_bytes']:,} bytes"
    name = shown(found["best"], most=_LONGEST)
    out.print(styled("best: ", (name, "bold"), f", {score}, {format_size(found['file_bytes'])}"), highlight=False)
