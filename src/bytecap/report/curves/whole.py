"""Byte-return curves of all paths over the whole model, with the lambda line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bytecap.report.curves import curve, line, styles
from bytecap.report.svg import Mark, chart, key

ORDER = 20
_CHARTS = (("kl_recovered", "kl_stderr", "KL recovered, nats per token"),
           ("loss_recovered", "loss_stderr", "loss recovered, nats per token"))  # fmt: skip
_LOST = 1.0  # KL of the base that a recoding may add and still be on its chart
_ACROSS = "bytes spent on top of the base"


def section(found: Mapping[str, Any]) -> str:
    """One chart of KL, with where each path has 90% of its gain, one of loss, and one of what recodes units."""
    style = styles(found)
    upward = {n: p for n, p in found["paths"].items() if n != "coarser" and p.get("kind") != "recoding"}
    drawn: list[str] = []
    for value, error, label in _CHARTS:
        series = [curve(n, p, style[n], value, error) for n, p in upward.items() if p["whole"]]
        marks = [
            Mark(at, f"{n}: 90% of its gain after {at:,.0f} bytes", style[n])
            for n, p in upward.items() if (at := p["ninety_percent_bytes"]) is not None
        ]  # fmt: skip
        if value == "kl_recovered":
            series.insert(0, line(found, max([x for s in series for x, _, _ in s.points], default=0.0)))
        title = f"{label} against bytes spent"
        drawn.append(chart(series, title, _ACROSS, label, marks=marks if len(drawn) == 0 else ()))
    legend = "".join(key(style[n], n) for n in upward) + key(-1, "lambda")
    return (
        f"<h2>The whole model</h2><p>{legend}</p>{''.join(drawn)}<p class='dim'>Every point is decoded from real "
        "sections. Bands are two standard errors, paired with the base on the same tokens. Lines at the upper edge "
        f"mark where a path has 90% of the most it recovered.</p>{_recoded(found)}"
    )


def _recoded(found: Mapping[str, Any]) -> str:
    """Return the chart of recodings beside finer and coarser steps; nothing if there are none."""
    style, least = styles(found), -_LOST * found["base"]["kl_nats"]
    near = {
        n: p | {"whole": [x for x in p["whole"] if x["kl_recovered"] >= least]}
        for n, p in found["paths"].items() if n in ("step", "coarser") or p.get("kind") == "recoding"
    }  # fmt: skip
    series = [curve(n, p, style[n]) for n, p in near.items() if p["whole"]]
    if all(n in ("step", "coarser") for n in near):
        return ""
    label = "KL recovered, nats per token"
    drawn = chart(series, "recodings: KL recovered against bytes spent or given back", _ACROSS, label)
    left = sum(len(found["paths"][n]["whole"]) - len(p["whole"]) for n, p in near.items())
    return (
        f"<h3>Units coded anew</h3><p>{''.join(key(style[n], n) for n in near)}</p>{drawn}<p class='dim'>{left} "
        "points that at least double the base's KL are in the tables only.</p>"
    )
