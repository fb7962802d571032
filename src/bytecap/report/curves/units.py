"""Every unit under every path: small predicted curves beside their figures, to be sorted and filtered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bytecap.report.curves import styles
from bytecap.report.frame import table
from bytecap.report.svg import spark

ORDER = 50
_HEAD = ("unit", "path", "curve", "section, bytes", "most bytes", "predicted gain", "best nats/byte", "over lambda",
         "measured")  # fmt: skip


def section(found: Mapping[str, Any]) -> str:
    """One table of small multiples; all curves of a unit are drawn to the same scale."""
    reach: dict[str, tuple[float, float]] = {}
    for path in found["paths"].values():
        for u in path["units"]:
            wide, high = reach.get(u["unit"], (1.0, 1e-12))
            hull = _hull(u)
            reach[u["unit"]] = max([wide, *(x for x, _ in hull)]), max([high, *(y for _, y in hull)])
    rows = [
        _row(found, name, u, reach[u["unit"]], styles(found)[name], path["sample"])
        for name, path in found["paths"].items() for u in path["units"]
    ]  # fmt: skip
    caption = (
        "Predicted nats per token against bytes from the hull of a unit's settings, to one scale for each unit; the "
        "dotted line is lambda. Over lambda: how many times what a finer step of the whole model buys"
    )
    return f"<h2>Unit by unit</h2>{table(_HEAD, rows, caption, name='units', raw=(2,))}"


def _hull(unit: Mapping[str, Any]) -> list[tuple[float, float]]:
    return sorted((p["bytes"], p["predicted_nats"]) for p in unit["points"] if p["on_hull"])


def _row(
    found: Mapping[str, Any], name: str, unit: Mapping[str, Any], reach: tuple[float, float], style: int,
    sample: Sequence[Mapping[str, Any]],
) -> list[str]:  # fmt: skip
    hull, slope = _hull(unit), found["lambda"]["nats_per_byte"]
    size, gain = hull[-1] if hull else (0.0, 0.0)
    best = max((y / x for x, y in hull if x > 0), default=None)
    measured = [x for x in sample if x["unit"] == unit["unit"]]
    label = f"{unit['unit']} under {name}: {gain:.2e} nats for {size:,.0f} bytes at most"
    drawn = spark([(0.0, 0.0), *hull], reach, style, label, slope=slope or 0.0)
    return [
        unit["unit"], name, f'<td data-value="{gain:.6e}">{drawn}</td>', f"{unit['section_bytes']:,}", f"{size:,.0f}",
        f"{gain:.2e}", "" if best is None else f"{best:.2e}",
        "" if best is None or not slope else f"{best / slope:.2f}",
        "; ".join(f"{x['kl_recovered']:.1e} for {x['bytes']:,}" for x in measured),
    ]  # fmt: skip
