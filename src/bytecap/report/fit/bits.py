"""Bits per parameter by layer and tensor role."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.format.ledger import by_unit
from bytecap.report.frame import broken

ORDER = 30


def place(unit: str) -> tuple[str, str]:
    """Return (layer, role) of a tensor: its first number, and its name without it.

    >>> place("model.layers.3.mlp.up_proj.weight"), place("model.norm.weight")
    (('3', 'mlp.up_proj'), ('-', 'model.norm'))
    """
    found = re.search(r"\.(\d+)\.", unit)
    short = unit.removesuffix(".weight")
    return (found[1], short[found.end() :]) if found else ("-", short)


def section(found: Mapping[str, Any]) -> str:
    """A table of layers and roles, shaded by bits."""
    cells: dict[tuple[str, str], tuple[int, int]] = {}
    for line in by_unit(found["ledger"]):
        if line.parameters:
            size, count = cells.get(place(line.unit), (0, 0))
            cells[place(line.unit)] = size + line.bytes, count + line.parameters
    if not cells:
        return ""
    layers = sorted({x for x, _ in cells}, key=lambda x: int(x) if x.isdigit() else -1)
    big = {role for (_, role), (_, count) in cells.items() if count >= 0.001 * sum(c for _, c in cells.values())}
    roles = [r for r in dict.fromkeys(r for _, r in sorted(cells, key=str)) if r in big]
    top = max(8 * n / c for (_, r), (n, c) in cells.items() if r in big)
    rows = "".join(
        f"<tr><th scope=row>{broken(r)}</th>{''.join(_cell(cells.get((x, r)), top) for x in layers)}</tr>"
        for r in roles
    )
    head = "".join(f"<th scope=col>{escape(x)}</th>" for x in layers)
    left = sorted({r for _, r in cells} - big)
    rest = f"<p class=dim>Left out, less than 0.1% of the parameters: {escape(', '.join(left))}.</p>" if left else ""
    return (
        "<h2>Bits per parameter by layer and role</h2><div class=wide tabindex=0 role=group aria-label=bits><table>"
        f"<thead><tr><th scope=col>role, layer</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>{rest}"
    )


def _cell(cell: tuple[int, int] | None, top: float) -> str:
    if cell is None:
        return "<td></td>"
    bits = 8 * cell[0] / cell[1]
    return (
        f'<td class=heat style="--v:{bits / top:.3f}" title="{cell[0]:,} bytes, {cell[1]:,} parameters">{bits:.2f}</td>'
    )
