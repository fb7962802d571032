"""Show predicted against measured quality."""

from __future__ import annotations

import math
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
    apart = distance(r)
    title = "measured KL and loss increase, nats per token, two standard errors"
    drawn = forest(shown, title, title, line=predicted or 0.0)
    return (
        f"<h2>Predicted and measured</h2><p>{escape(words)}</p>{drawn}"
        f"{table(('text', 'KL to the original', 'loss increase'), rows, 'Nats per token')}"
        + (f"<h3>Calibration and evaluation text</h3><p>{escape(apart)}.</p>{_texts(r)}" if apart else "")
    )


def distance(report: Mapping[str, Any]) -> str:
    """Say in one line how far calibration and evaluation text are from one another; nothing if it was not measured.

    >>> found = {"calibration_nats": 3.21, "evaluation_nats": 3.0, "calibration_kl": 0.206, "evaluation_kl": 0.232}
    >>> distance({"text_distance": found})
    "calibration 3.21 nats, evaluation 3.00; KL 0.206 on calibration's held-out windows, 0.232 on evaluation"
    """
    found = report.get("text_distance")
    if not found:
        return ""
    here, there, kl_here, kl_there = (
        math.nan if found[k] is None else found[k]
        for k in ("calibration_nats", "evaluation_nats", "calibration_kl", "evaluation_kl")
    )
    said = f"calibration {here:.2f} nats, evaluation {there:.2f}"
    if math.isfinite(kl_here):  # the loss holds predictions
        said += f"; KL {kl_here:.3g} on calibration's held-out windows, {kl_there:.3g} on evaluation"
    return said


def _texts(report: Mapping[str, Any]) -> str:
    """Table of calibration's and evaluation's texts: how the original sees them, and how close the file is to it."""
    rows = [
        [t["name"], kind, f"{t['tokens']:,}", _figure(t["nats_original"]), _figure(t["bpb_original"]),
         plus_minus(t["kl_nats"], t["kl_stderr"])]
        for kind, texts in (("calibration", report["calibration_held_out"]), ("evaluation", report["texts"]))
        for t in texts
    ]  # fmt: skip
    head = ("text", "for", "tokens", "original, nats per token", "original, bits per byte", "KL to the original")
    return table(head, rows, "Texts as the original sees them; of calibration the windows that no statistic has seen")


def _figure(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.3f}"
