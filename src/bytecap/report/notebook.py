"""Draw the ledger of a file in a notebook: one bar of kinds, then the largest owners."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bytecap.format.ledger import Entry, by_kind, by_unit, total
from bytecap.report.svg import COLOURS

_MOST = 12  # owners


def ledger(entries: Sequence[Entry], title: str) -> str:
    """Return a ledger's markup, without scripts and style sheets, for light and dark notebooks."""
    size = max(1, total(entries))
    kinds = by_kind(entries)
    colours = {k: COLOURS[i % len(COLOURS)] for i, k in enumerate(kinds)}
    bar = "".join(
        f'<div title="{escape(k)} {n:,} bytes" style="width:{100 * n / size:.3f}%;background:{colours[k]}"></div>'
        for k, n in kinds.items()
    )
    key = " ".join(
        f'<span style="white-space:nowrap"><span style="color:{colours[k]}">&#9632;</span> {escape(k)} {n:,}</span>'
        for k, n in kinds.items()
    )
    lines = by_unit(entries)
    rows = [
        (x.unit, x.bytes, f"{8 * x.bytes / x.parameters:.3f}" if x.parameters else "") for x in lines[:_MOST]
    ]  # fmt: skip
    if rest := lines[_MOST:]:
        rows.append((f"{len(rest)} more", sum(x.bytes for x in rest), ""))
    body = "".join(
        f'<tr><td style="text-align:left">{escape(name)}</td><td>{n:,}</td><td>{100 * n / size:.2f}%</td>'
        f"<td>{bits}</td></tr>"
        for name, n, bits in rows
    )
    return (
        f"<div><p><b>{escape(title)}</b></p>"
        f'<div style="display:flex;height:1.2em;max-width:48em">{bar}</div><p>{key}</p>'
        "<table><thead><tr><th>owner</th><th>bytes</th><th>share</th><th>bits/parameter</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
