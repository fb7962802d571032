"""Single units, one at a time: predicted against measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bytecap.report.curves import ranks, styles
from bytecap.report.frame import plus_minus, table
from bytecap.report.svg import Series, chart, key

ORDER = 40
_HEAD = ("path", "unit", "setting", "bytes", "predicted", "measured")


def section(found: Mapping[str, Any]) -> str:
    """A scatter chart, the rank correlation of every path, and all points as a table."""
    style = styles(found)
    series = [
        Series(n, [(x["predicted_nats"], x["kl_recovered"], x["kl_stderr"] or 0.0) for x in path["sample"]], style[n],
               line=False, tips=[f"{n}, {x['unit']}, {x['setting']}: predicted {x['predicted_nats']:.2e}, measured "
                                 f"{x['kl_recovered']:.2e} ± {x['kl_stderr'] or 0:.1e}" for x in path["sample"]])
        for n, path in found["paths"].items()
    ]  # fmt: skip
    drawn = chart(series, "Measured against predicted gain of single units", "predicted, nats per token",
                  "measured, nats per token", height=340, zero=False)  # fmt: skip
    rows = [
        [n, x["unit"], x["setting"], f"{x['bytes']:,}", f"{x['predicted_nats']:.2e}",
         plus_minus(x["kl_recovered"], x["kl_stderr"], 6)]
        for n, path in found["paths"].items() for x in path["sample"]
    ]  # fmt: skip
    by_overlay = [
        [n, str(a["points"]), *("-" if a[k] is None else f"{a[k]:.3f}" for k in ("spearman", "ceiling"))]
        for n, path in found["paths"].items() for a in [path["agreement"]]
    ]  # fmt: skip
    legend = "".join(key(i, n) for n, i in style.items())
    return (
        f"<h2>Single units, one at a time</h2><p>Everything else at the base, {found['held_out_tokens']:,} held-out "
        f"tokens: {ranks(found['agreement'])}.</p><p>{legend}</p>{drawn}"
        + table(("path", "points", "rank correlation", "noise allows"), by_overlay, "Agreement by path")
        + f"<details><summary>All points as a table</summary>{table(_HEAD, rows, 'nats per token', name='singles')}"
        "</details>"
    )
