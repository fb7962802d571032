"""Quality against bytes of every method, with the lower envelope."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.report.comparison import NAMES, styles
from bytecap.report.frame import plus_minus
from bytecap.report.svg import Series, chart, key

ORDER = 20


def section(found: Mapping[str, Any]) -> str:
    """One chart for each model and figure; small ones for every text where there are several."""
    return "\n".join(_model(m) for m in found["models"] if m["cells"])


def _model(model: Mapping[str, Any]) -> str:
    legend = "".join(key(i, n) for n, i in styles(model).items()) + key(-1, "envelope")
    texts = [t["name"] for t in model["texts"]] if len(model["texts"]) > 1 else []
    drawn = [_chart(model, "kl", "mean", 380), _chart(model, "loss", "mean", 320)]
    drawn += [f"<h3>{escape(t)}</h3>{_chart(model, 'kl', t, 260)}" for t in texts]
    return (
        f"<h2>{escape(model['model'])}: quality against bytes</h2><p>{legend}</p>{''.join(drawn)}"
        '<p class="dim">Whiskers are one standard error of the figure itself; differences between methods on the '
        "same tokens are surer than they suggest (below).</p>"
    )


def _chart(model: Mapping[str, Any], metric: str, text: str, height: int) -> str:
    series = []
    for name, style in styles(model).items():
        mine = sorted((c for c in model["cells"] if c["method"] == name), key=lambda c: c["file_bytes"])
        scores = [c["scores"][text][metric] for c in mine]
        points = [(c["file_bytes"], s["mean"], s["stderr"] or 0.0) for c, s in zip(mine, scores, strict=True)]
        tips = [
            f"{name}, {c['file_bytes']:,.0f} bytes: {NAMES[metric]} {plus_minus(s['mean'], s['stderr'], 5)}"
            for c, s in zip(mine, scores, strict=True)
        ]
        series.append(Series(name, points, style, tips=tips))
    if text == "mean":
        series.insert(0, Series("envelope", [(x, y, 0.0) for x, y in model["envelope"][metric]], -1))
    log = all(p[1] > 0 for s in series for p in s.points)
    label = f"{NAMES[metric]}, nats per token"
    title = f"{label}, against file bytes ({text}; {model['model']})"
    across = "file size, bytes (everything counted)"
    return chart(series, title, across, label, height=height, log=log, zero=False)
