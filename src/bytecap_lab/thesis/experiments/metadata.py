"""Experiment 7 tests whether side information erases the win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bytecap_lab.thesis.evidence import Evidence
from bytecap_lab.thesis.statistics import FALSIFIED, SUPPORTED, UNDECIDED, FloatArray, Interval, Verdict

ORDER, TITLE, KIND = 7, "Metadata", "falsifier"
HYPOTHESIS = "Side information does not erase the win."
STATISTIC = "lead of exceptions over finer steps everywhere at equal bytes, all bytes counted"
NEEDS = ("base", "arm global", "arm exceptions")
MAIN, LINE = "counted", 0.0


def effects(one: Evidence, others: Sequence[Evidence]) -> dict[str, FloatArray]:
    """Leads with and without side information."""
    del others
    at = one.amount("exceptions")
    free = min(at, float(one.curve("exceptions", without="side_bytes")[0][-1]))
    without = one.over(one.recovery("exceptions", free, without="side_bytes"), free) - 1
    return {"counted": one.q("exceptions", at) - 1, "uncounted": without}


def decide(found: Mapping[str, Interval]) -> Verdict:
    """A counted win survives; an uncounted one that is a loss when counted was erased."""
    counted, free = found["counted"], found["uncounted"]
    if counted.low > 0:
        return SUPPORTED, ""
    if free.low <= 0:
        return UNDECIDED, "no win to erase"
    return (FALSIFIED, "") if counted.high < 0 else (UNDECIDED, "a win uncounted, neither win nor loss counted")


def details(one: Evidence, others: Sequence[Evidence]) -> list[tuple[str, str]]:
    """Share of side information at every amount."""
    del others
    return [
        (f"side information within {p['bytes']:,} bytes", f"{p['side_bytes'] / p['bytes']:.1%}")
        for p in one.points("exceptions")
    ]
