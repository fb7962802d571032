"""Print a choice among models on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bytecap.escape import console, shown, styled
from bytecap.report.choice.every import HEAD, cells
from bytecap.sizes import format_size

_WIDE = 160  # columns where there is no terminal to ask
_PLAN = ("model", "cap", "parameters", "smallest file", "tokens scored", "bits/parameter", "outcome")
_LONGEST = 300  # characters of a reason


def print_choice(found: Mapping[str, Any]) -> None:
    """Print every model at every budget, and the best at the cap."""
    out = _wide()
    _print_rows(HEAD, found["rows"], cells, out)
    score = f"{found['bpb']:.4f} ± {found['bpb_stderr']:.4f} bits per byte on {found['evaluation_bytes']:,} bytes"
    name = shown(found["best"], most=_LONGEST)
    out.print(styled("best: ", (name, "bold"), f", {score}, {format_size(found['file_bytes'])}"), highlight=False)


def print_plan(found: Mapping[str, Any]) -> None:
    """Print which models fit which caps, and how much would be fitted."""
    out = _wide()
    _print_rows(_PLAN, found["rows"], _planned, out)
    out.print(
        f"at most {found['short_fits']} short fits and {found['whole_fits']} whole ones, scored on "
        f"{found['evaluation_bytes']:,} bytes; nothing was fitted", highlight=False,
    )  # fmt: skip


def _planned(row: Mapping[str, Any]) -> list[str]:
    bits = row.get("bits_per_parameter")
    numbers = [row.get(k) for k in ("parameters", "floor_bytes", "evaluation_tokens")]
    return [
        row["model"], f"{row['budget_bytes']:,}", *("-" if n is None else f"{n:,}" for n in numbers),
        "-" if bits is None else f"{bits:.2f}", f"out: {row['out']}" if "out" in row else row["planned"],
    ]  # fmt: skip


def _wide() -> Console:
    out = console()
    return out if out.is_terminal else console(width=_WIDE)


def _print_rows(
    head: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    texts: Callable[[Mapping[str, Any]], list[str]],
    out: Console,
) -> None:
    """Print a table, smallest cap first."""
    table = Table(box=None, pad_edge=False)
    for title in head:
        table.add_column(title, justify="left" if title in {"model", "outcome"} else "right")
    for row in sorted(rows, key=lambda r: r["budget_bytes"]):
        table.add_row(*(shown(c, most=_LONGEST) for c in texts(row)))
    out.print(table, highlight=False)
