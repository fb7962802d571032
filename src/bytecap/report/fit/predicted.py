"""Show predicted against measured quality."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bytecap.report.frame import plus_minus, table
from bytecap.report.svg import forest

ORDER = 40


def section(found: Mapping[str, Any]) -> str:
    """Measured KL and loss of every text beside the prediction."""
    r = found["report"]
    if not r.get("texts"):
        return ""
    texts = [*r["texts"], {**r, "name": "mean", "delta_nats": r["measured_delta_nats"],
                           "delta_stderr": r["measured_delta_stderr"]}]  # fmt: skip
    rows = [[t["name"], plus_minus(t["kl_nats"], t["kl_stderr"]), plus_minus(t["delta_nats"], t["delta_stderr"])]
            for t in texts]  # fmt: skip
    shown = [(f"{t['name']}: {word}", t[mean], t[error] or 0.0, style)
             for t in texts for word, mean, error, style in (("KL", "kl_nats", "kl_stderr", 0),
                                                             ("loss", "delta_nats", "delta_stderr", 1))
             if t[mean] is not None]  # fmt: skip
    predicted = r["predicted_delta_nats"]
    words = (
        "This method predicts nothing." if predicted is None
        else f"Predicted KL on the correction tokens: {predicted:.4f} nats per token (dotted)."
    )  # fmt: skip
    title = "measured KL and loss increase, nats per token, two standard errors"
    drawn = forest(shown, title, title, line=predicted or 0.0)
    return (
        f"<h2>Predicted and measured</h2><p>{escape(words)}</p>{drawn}"
        f"{table(('text', 'KL to the original', 'loss increase'), rows, 'Nats per token')}"
    )
