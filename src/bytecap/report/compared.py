"""Print a comparison on the terminal: tables, a sparkline for each method, plain text when piped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bytecap.escape import console, styled
from bytecap.report.comparison import NAMES, winner
from bytecap.report.frame import plus_minus

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDE = 160  # columns where there is no terminal to ask


def sparkline(values: Sequence[float]) -> str:
    """Draw values as bars on a logarithmic scale from the smallest to the largest.

    >>> sparkline([1.0, 0.1, 0.01])
    '█▅▁'
    """
    logs = [math.log(max(v, 1e-12)) for v in values]
    low, high = min(logs), max(logs)
    return "".join(_BLOCKS[round((v - low) / (high - low) * 7) if high > low else 0] for v in logs)


def print_comparison(found: Mapping[str, Any]) -> None:
    """Print cells, differences, wins and bytes saved."""
    out = console()
    if not out.is_terminal:
        out = console(width=_WIDE)
    for model in found["models"]:
        _print_model(model, out)
    if any(len(m.get("seeds", ())) == 1 for m in found["models"]):
        out.print("one calibration seed: standard errors hold the noise of the texts, not that of calibration")
    out.print(f"{found['cpu_seconds']:,.0f} CPU seconds in all runs", highlight=False)


def _print_model(model: Mapping[str, Any], out: Console) -> None:
    out.print(styled((model["model"], "bold")), highlight=False)
    for r in model["refused"]:
        out.print(f"{r['method']} cannot get below {r['floor_bytes']:,} bytes: no run at {r['budget_bytes']:,}",
                      highlight=False)  # fmt: skip
    if not model["cells"]:
        return
    first = model["methods"][0]
    rows = [
        [f"{c['budget_bytes']:,}", c["method"], f"{c['file_bytes']:,.0f}", *_scores(c["scores"]["mean"])]
        for c in sorted(model["cells"], key=lambda c: (c["budget_bytes"], model["methods"].index(c["method"])))
    ]
    head = ["budget", "method", "file bytes", "KL", f"minus {first}", "loss increase", f"minus {first}"]
    out.print(_table(head, rows, words=(1,)), highlight=False)
    _print_tasks(model["cells"], out)
    for method in model["methods"]:
        mine = sorted((c for c in model["cells"] if c["method"] == method), key=lambda c: c["file_bytes"])
        values = [c["scores"]["mean"]["kl"]["mean"] for c in mine]
        out.print(f"{sparkline(values)} KL of {method} over rising bytes", highlight=False)
    wins = [[f"{w['budget_bytes']:,}", w["text"], NAMES[w["metric"]], winner(w), w["second"],
             plus_minus(w["difference"]["mean"], w["difference"]["stderr"])] for w in model["wins"]]  # fmt: skip
    head = ["budget", "text", "figure", "best", "second", "second minus best"]
    if wins:
        out.print(_table(head, wins, words=(1, 2, 3, 4)), highlight=False)
    for x in model["saved"]:
        if x["metric"] == "kl" and x["method"] == first:
            out.print(f"{first} saves {100 * x['mean']:.1f}% ± {100 * (x['stderr'] or 0):.1f}% of the bytes of "
                          f"{x['against']} at equal KL ({len(x['points'])} points)", highlight=False)  # fmt: skip


def _print_tasks(cells: Sequence[Mapping[str, Any]], out: Console) -> None:
    """Print scores on tasks beside KL, with the paired difference to the original."""
    rows = [
        [f"{c['budget_bytes']:,}", c["method"], plus_minus(kl["mean"], kl["stderr"]), name,
         plus_minus(t["mean"], t["stderr"]), f"{t['original']:.4f}" if "original" in t else "",
         plus_minus(t["difference"]["mean"], t["difference"]["stderr"]) if "difference" in t else ""]
        for c in sorted(cells, key=lambda c: c["budget_bytes"])
        for kl in [c["scores"]["mean"]["kl"]]
        for name, t in c.get("tasks", {}).items()
    ]  # fmt: skip
    if rows:
        head = ["budget", "method", "KL", "task", "score", "original", "minus original"]
        out.print(_table(head, rows, words=(1, 3)), highlight=False)


def _scores(scores: Mapping[str, Any]) -> list[str]:
    cells = []
    for metric in NAMES:
        cells.append(plus_minus(scores[metric]["mean"], scores[metric]["stderr"]))
        against = scores.get("against")
        cells.append(plus_minus(against[metric]["mean"], against[metric]["stderr"]) if against else "")
    return cells


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int]) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(head):
        table.add_column(title, justify="left" if i in words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
