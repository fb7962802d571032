"""Experiment 3 tests structured exceptions against irregular ones, after final coding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bytecap_lab.thesis.evidence import Evidence
from bytecap_lab.thesis.statistics import (
    FALSIFIED,
    SUPPORTED,
    THRESHOLD,
    FloatArray,
    Interval,
    Missing,
    Verdict,
    standard,
)

ORDER, TITLE, KIND = 3, "Structure", "support"
HYPOTHESIS = "Structured exceptions survive final coding better than irregular ones."
STATISTIC = (
    "recovery of columns, rows and channels minus that of outliers at equal bytes, over that of finer steps everywhere"
)
NEEDS = ("base", "arm global", "arm structured", "arm irregular")
MAIN, LINE = "difference", THRESHOLD
_ARMS = ("structured", "irregular")


def effects(one: Evidence, others: Sequence[Evidence]) -> dict[str, FloatArray]:
    """Difference of q, and the logarithm of the ratio of survivals."""
    del others
    at = one.amount(*_ARMS)
    kept = [survival(one, a, at) for a in _ARMS]
    difference = one.q("structured", at) - one.q("irregular", at)
    return {"difference": difference, "survival": np.full(len(difference), np.log(kept[0] / kept[1]))}


def survival(one: Evidence, arm: str, at: float) -> float:
    """Nominal bytes over those of the coded layers, at the point nearest to an amount."""
    point = min(one.points(arm), key=lambda p: abs(p["bytes"] - at))
    if not point["layer_bytes"]:
        raise Missing(f"{arm} stored no layer")
    return float(point["nominal_bytes"] / point["layer_bytes"])


def decide(found: Mapping[str, Interval]) -> Verdict:
    """Standard rule; the survival must be the higher one too."""
    if found["survival"].mean <= 0:
        return FALSIFIED, "survival of structured exceptions is not higher"
    word, why = standard(found["difference"])
    return (SUPPORTED, "") if word == SUPPORTED else (word, why)


def details(one: Evidence, others: Sequence[Evidence]) -> list[tuple[str, str]]:
    """Survival of both."""
    del others
    at = one.amount(*_ARMS)
    return [(f"nominal over coded bytes, {a}", f"{survival(one, a, at):.3f}") for a in _ARMS]
