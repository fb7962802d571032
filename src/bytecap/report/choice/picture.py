"""Draw bits per byte against bytes: a curve for each model, and the envelope of the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bytecap.report.choice import names
from bytecap.report.svg import Series, chart, key

ORDER = 1


def section(found: Mapping[str, Any]) -> str:
    """Return the chart with its legend."""
    series = [_curve(found, name, style) for style, name in enumerate(names(found))]
    drawn = [s for s in series if s.points]
    envelope = [(e["file_bytes"] / 1e6, e["bpb"], 0.0) for e in found["envelope"]]
    guide = [Series("envelope", envelope, -1)] if len(envelope) > 1 else []
    legend = "".join(key(s.style, s.name) for s in drawn) + (key(-1, "best whole fits") if guide else "")
    return (
        "<h2>Bits per byte against bytes</h2><p>Whole fits where there are any, short fits elsewhere; less is better."
        f"</p><p>{legend}</p>"
        + chart(
            [*guide, *drawn], "Bits per byte of every model at every size", "megabytes of the file (logarithmic)",
            "bits per byte", zero=False, near=True, wide=True,
        )
    )  # fmt: skip


def _curve(found: Mapping[str, Any], name: str, style: int) -> Series:
    """Return a model's points over rising bytes."""
    points, tips = [], []
    for row in sorted((r for r in found["rows"] if r["model"] == name), key=lambda r: r["budget_bytes"]):
        for kind in ("whole", "short"):
            if kind in row:
                scored = row[kind]
                points.append((scored["file_bytes"] / 1e6, scored["bpb"], scored["bpb_stderr"]))
                tips.append(f"{name}, {scored['file_bytes']:,} bytes, {kind} fit: {scored['bpb']:.4f} bits per byte")
                break
    return Series(name, points, style, tips=tips)
