"""Byte-return curves of all paths over the whole model, with the lambda line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bytecap.report.curves import curve, line, styles
from bytecap.report.svg import Mark, chart, key

ORDER = 20
_CHARTS = (("kl_recovered", "kl_stderr", "KL recovered, nats per token"),
           ("loss_recovered", "loss_stderr", "loss recovered, nats per token"))  # fmt: skip


def section(found: Mapping[str, Any]) -> str:
    """One chart of KL, with where each path has 90% of its gain, and one of loss."""
    style = styles(found)
    legend = "".join(key(i, n) for n, i in style.items()) + key(-1, "lambda")
    drawn: list[str] = []
    for value, error, label in _CHARTS:
        series = [curve(n, p, style[n], value, error) for n, p in found["paths"].items() if p["whole"]]
        marks = [
            Mark(at, f"{n}: 90% of its gain after {at:,.0f} bytes", style[n])
            for n, p in found["paths"].items() if (at := p["ninety_percent_bytes"]) is not None
        ]  # fmt: skip
        if value == "kl_recovered":
            series.insert(0, line(found, max([x for s in series for x, _, _ in s.points], default=0.0)))
        across = "bytes spent on top of the base"
        title = f"{label} against bytes spent"
        drawn.append(chart(series, title, across, label, marks=marks if len(drawn) == 0 else ()))
    return (
        f"<h2>The whole model</h2><p>{legend}</p>{''.join(drawn)}<p class='dim'>Every point is decoded from real "
        "sections. Bands are two standard errors, paired with the base on the same tokens. Lines at the upper edge "
        "mark where a path has 90% of the most it recovered.</p>"
    )
