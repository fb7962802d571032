"""One card for each experiment: the verdict on models trained under the registration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bytecap.report.frame import cards
from bytecap.report.thesis import SIGNS, interval

ORDER = 10


def section(found: Mapping[str, Any]) -> str:
    """State the thesis, and show one card for each experiment."""
    items = [
        (f"{e['number']} {e['title']} ({e['kind']})", SIGNS[e["verdict"]], f"{e['hypothesis']} {_note(e)}")
        for e in found["experiments"]
    ]
    return (
        "<p><em>Once models are in the aggressive low-bit regime, the next gains come from better byte-return ranking "
        "and budgeting, not from globally lowering quantization error.</em></p><p>Hypotheses, statistics, thresholds "
        "and rules were registered in docs/thesis.md before the first run; cards hold only what was measured on models "
        f"trained after that. Supported always speaks for the thesis.</p><h2>Verdicts</h2>{cards(items)}"
    )


def _note(experiment: Mapping[str, Any]) -> str:
    parts = [experiment["reason"]] if experiment["reason"] else []
    main = experiment["main"]
    parts += [
        f"{g['recipe']} on {g['base']}: {interval(g['effects'][main])}"
        for g in experiment["groups"]
        if main in g["effects"]
    ]
    return "; ".join(parts) or "no group"
