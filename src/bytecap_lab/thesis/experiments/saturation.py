"""Experiment 2 tests whether the best protected subset is tiny and saturates quickly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bytecap_lab.thesis.evidence import Evidence
from bytecap_lab.thesis.statistics import FALSIFIED, SUPPORTED, UNDECIDED, FloatArray, Interval, Verdict

ORDER, TITLE, KIND = 2, "Saturation", "support"
HYPOTHESIS = "The best protected subset is tiny and saturates quickly."
STATISTIC = "bytes at 90% of the most that exceptions recover, as a share of the file"
NEEDS = ("base", "arm exceptions")
MAIN, LINE = "share", 0.02
_ENOUGH = 0.9


def effects(one: Evidence, others: Sequence[Evidence]) -> dict[str, FloatArray]:
    """The share, and the most recovered."""
    del others
    one.reach("exceptions")
    size, values = one.curve("exceptions")
    best = values.max(0)
    file = float(one.line("base")["budget_bytes"]) * one.acted / one.bytes  # what of it the arms act on
    return {"share": saturated(size, values) / file, "recovered": best}


def saturated(size: FloatArray, values: FloatArray) -> FloatArray:
    """Bytes at which each column of values (points, n) first reaches 90% of its most; NaN where nothing is gained.

    >>> saturated(np.array([0.0, 10.0, 20.0]), np.array([[0.0], [0.5], [1.0]])).round(6).tolist()
    [18.0]
    """
    wanted = _ENOUGH * values.max(0)
    found = np.full(values.shape[1], np.nan)
    for i in range(len(size) - 1, 0, -1):
        low, high = values[i - 1], values[i]
        with np.errstate(invalid="ignore", divide="ignore"):
            at = size[i - 1] + (size[i] - size[i - 1]) * np.clip((wanted - low) / (high - low), 0, 1)
        found = np.where((high >= wanted) & (wanted > 0), at, found)
    return found


def decide(found: Mapping[str, Interval]) -> Verdict:
    """At most 2% of the file, surely; more, surely; or neither."""
    if found["recovered"].low <= 0:
        return UNDECIDED, "what exceptions recover is not surely above 0"
    share = found["share"]
    if share.high <= LINE:
        return SUPPORTED, ""
    return (FALSIFIED, "") if share.low > LINE else (UNDECIDED, "the interval holds both")


def details(one: Evidence, others: Sequence[Evidence]) -> list[tuple[str, str]]:
    """The curve."""
    del others
    size, values = one.curve("exceptions")
    return [(f"{s:,.0f} bytes of exceptions", f"{v[0]:.5f} nats per token recovered")
            for s, v in zip(size[1:], values[1:], strict=True)]  # fmt: skip
