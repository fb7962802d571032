"""Markdown of what table.py measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_EXPORTS = ("int8+zlib", "golf", "bytecap")


def show(rows: Sequence[Row]) -> str:
    """All tables of the lines of a results file; of equal cells the last line counts."""
    cells = {(r["model"], r["seed"], r["budget"]): r for r in rows if r["benchmark"] == "golf"}
    seeds = {(r["model"], r["seed"], r["budget"]): r for r in rows if r["benchmark"] == "golf-seeds"}
    parts = [_cells([cells[k] for k in sorted(cells, key=lambda k: (k[0], k[1], -k[2]))])] if cells else []
    parts += [_seeds([seeds[k] for k in sorted(seeds)])] if seeds else []
    return "\n\n".join(parts)


def _cells(rows: Sequence[Row]) -> str:
    lines = [
        "| model | bytes | before | int8+zlib-9 | golf | bytecap | gap golf | gap bytecap | ratio | KL ratio | slack |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        exports = r["exports"]
        after = " | ".join(_after(exports[n]) for n in _EXPORTS)
        gaps = " | ".join(f"{exports[n]['gap']:.5f}" for n in ("golf", "bytecap"))
        clear = exports["golf"]["gap"] > 2 * exports["golf"]["gap_stderr"]  # else there is nothing to divide by
        ratio = f"{r['gap_ratio']:.3f} ± {r['gap_ratio_stderr']:.3f}" if clear else "within noise"
        lines.append(
            f"| {r['model']} | {r['budget']:,} | {r['bits_per_byte']:.4f} | {after} | {gaps} | {ratio} "
            f"| {r['kl_ratio']:.3f} ± {r['kl_ratio_stderr']:.3f} | {exports['bytecap']['slack']} |"
        )
    return "\n".join(lines)


def _after(export: Row) -> str:
    return f"{export['bits_per_byte']:.4f}" if export["fits"] else f"does not fit ({export['bytes']:,})"


def _seeds(rows: Sequence[Row]) -> str:
    lines = ["| model | seed | budget | file | slack | seconds of fit |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['model']} | {r['seed']} | {r['budget']:,} | {r['bytes']:,} | {r['slack']} | {r['fit_seconds']} |"
        for r in rows
    ]
    return "\n".join(lines)
