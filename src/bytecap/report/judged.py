"""Verdicts on the terminal: one table, and one line for each experiment as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bytecap.report.thesis import interval, short

_WIDE = 170  # columns where there is no terminal to ask
_COLOURS = {"supported": "green", "falsified": "red", "undecided": "yellow"}


def print_thesis(found: Mapping[str, Any]) -> None:
    """Print every model on every base, every group, then every experiment."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("experiment", "who", "base", "verdict", "effect [95%]", "detectable", "reason"):
        table.add_column(title)
    for e in found["experiments"]:
        groups = [(f"{g['recipe']} ({g['models']} models)", g) for g in e["groups"]]
        cells = [(short(c["model"]) + ("" if c["counts"] else " (exploration)"), c) for c in e["cells"]]
        for who, row in (*cells, *groups):
            main = row["effects"].get(e["main"])
            table.add_row(
                f"{e['number']} {e['title']}", who, row["base"], f"[{_COLOURS[row['verdict']]}]{row['verdict']}[/]",
                f"{e['main']} {interval(main)}" if main else "-", f"{main['detectable']:.3f}" if main else "-",
                row["reason"],
            )  # fmt: skip
    console.print(table, highlight=False)
    console.print("[bold]On models trained under the registration:[/bold]", highlight=False)
    for e in found["experiments"]:
        why = f" ({e['reason']})" if e["reason"] else ""
        console.print(f"{e['number']} {e['title']}: [{_COLOURS[e['verdict']]}]{e['verdict']}[/]{why}", highlight=False)
    console.print(f"{found['cpu_seconds']:,.0f} CPU seconds", highlight=False)
