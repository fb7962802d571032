"""Experiment 8 tests whether execution rewards uniform formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bytecap_lab.thesis.evidence import Evidence
from bytecap_lab.thesis.statistics import (
    FALSIFIED,
    RESAMPLES,
    SUPPORTED,
    THRESHOLD,
    UNDECIDED,
    FloatArray,
    Interval,
    Verdict,
    standard,
)

ORDER, TITLE, KIND = 8, "Execution", "falsifier"
HYPOTHESIS = "Execution does not reward uniform formats so much that selection loses at equal bytes and equal time."
STATISTIC = "time with exceptions over time without, decoding or matrix-vector products, whichever is worse"
NEEDS = ("base", "arm global", "arm exceptions", "timing")
MAIN, LINE = "time ratio", 1.10
_TWICE = 2.0
KINDS = ("decode", "multiply")


def effects(one: Evidence, others: Sequence[Evidence]) -> dict[str, FloatArray]:
    """Ratios of time, and the lead of exceptions."""
    del others
    line = one.line("timing")
    ratios = {k: ratio(line[k]["exceptions"], line[k]["global"]) for k in KINDS}
    lead = one.q("exceptions", one.amount("exceptions")) - 1
    return {"time ratio": np.maximum(*ratios.values()), "lead": lead, **ratios}


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> FloatArray:
    """Geometric mean of paired repetitions' ratios, with resamples of the repetitions."""
    logs = np.log(np.array(mine) / np.array(theirs))
    rng = np.random.default_rng(8)
    drawn = logs[rng.integers(0, len(logs), (RESAMPLES, len(logs)))].mean(1)
    found: FloatArray = np.exp(np.concatenate([[logs.mean()], drawn]))
    return found


def decide(found: Mapping[str, Interval]) -> Verdict:
    """No slower; or slower but ahead; or slower and not ahead."""
    time, lead = found["time ratio"], found["lead"]
    if time.high <= LINE:
        return SUPPORTED, ""
    if time.low > LINE:
        if standard(lead)[0] == SUPPORTED and found["decode"].mean <= _TWICE:
            return SUPPORTED, "slower, but ahead at equal bytes"
        if lead.high < THRESHOLD:
            return FALSIFIED, "slower, and not ahead at equal bytes"
    return UNDECIDED, "the intervals hold both"


def details(one: Evidence, others: Sequence[Evidence]) -> list[tuple[str, str]]:
    """Median seconds of every format."""
    del others
    line = one.line("timing")
    return [(f"seconds to {k} all matrices, {n}", f"{np.median(v):.4f}") for k in KINDS for n, v in line[k].items()]
