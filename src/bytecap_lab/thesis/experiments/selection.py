"""Experiment 1 tests selective spending against globally lower error, at equal bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np

from bytecap_lab.thesis.evidence import Evidence
from bytecap_lab.thesis.statistics import THRESHOLD, FloatArray, Interval, Missing, Verdict, all_of, standard

ORDER, TITLE, KIND = 1, "Selection", "support"
HYPOTHESIS = "At equal bytes, a selective scheme beats a globally better quantizer."
STATISTIC = "KL recovered by the best ranking over that of finer steps everywhere at equal bytes, minus 1"
NEEDS = ("base", "arm global", "arm ranked", "arm exceptions")
MAIN, LINE = "lead", THRESHOLD
_FAR = 0.01  # of the grid's bytes: how much larger it may be for its curve to be continued downwards


def effects(one: Evidence, others: Sequence[Evidence]) -> dict[str, FloatArray]:
    """Lead of `ranked`; on golf also against the grid; lead of `exceptions` beside them."""
    at = one.amount("ranked")
    found = {"lead": one.q("ranked", at) - 1}
    if one.base == "golf":
        found["lead over the grid"] = _over_grid(one, others, at)
    with contextlib.suppress(Missing):
        found["exceptions alone"] = one.q("exceptions", one.amount("exceptions")) - 1
    return found


def _over_grid(one: Evidence, others: Sequence[Evidence], at: float) -> FloatArray:
    grid = next((o for o in others if (o.model, o.base) == (one.model, "grid")), None)
    if grid is None:
        raise Missing("the grid base, golf's rival, was not measured")
    more = one.bytes + at - grid.bytes
    if more < -_FAR * grid.bytes:
        raise Missing("the grid's file is larger: there is no rival at equal bytes")
    if more >= 0:
        gained = grid.recovery("global", more)
    else:
        (_, first, *_), (_, gain, *_) = grid.curve("global")
        gained = gain * (more / first)
    rival = grid.draw.mean(grid.line("base")["kl"]) - gained
    mine = one.draw.mean(one.line("base")["kl"]) - one.recovery("ranked", at)
    return one.over(np.asarray(rival - mine), at)


def decide(found: Mapping[str, Interval]) -> Verdict:
    """Standard rule on every lead over a quantizer."""
    return all_of([standard(i) for n, i in found.items() if n != "exceptions alone"])


def details(one: Evidence, others: Sequence[Evidence]) -> list[tuple[str, str]]:
    """Return the choices of the best ranking at each amount."""
    del others
    return [
        (f"{p['bytes']:,} bytes by ranking", ", ".join(f"{n} {k}" for k, n in p["paths"].items()))
        for p in one.points("ranked")
    ]
