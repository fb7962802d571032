"""Experiment 4 tests whether blocks used several times make side paths more valuable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bytecap_lab.thesis.evidence import Evidence
from bytecap_lab.thesis.statistics import THRESHOLD, FloatArray, Interval, Missing, NotApplicable, Verdict, standard

ORDER, TITLE, KIND = 4, "Repetition", "support"
HYPOTHESIS = (
    "Shared blocks used k times make protected side paths more valuable than blocks of the same size used once."
)
STATISTIC = "q of exceptions in a looped model minus that of the plain one of the same seed"
NEEDS = ("base", "arm global", "arm exceptions")
MAIN, LINE = "difference", THRESHOLD
LOOPED, PLAIN = "looped", "mini"


def effects(one: Evidence, others: Sequence[Evidence]) -> dict[str, FloatArray]:
    """Difference of q between a looped model and its plain partner."""
    if one.recipe != LOOPED:
        raise NotApplicable("no block of this model is used twice")
    mine = (PLAIN, one.seed, one.base, one.registration)
    partner = next((o for o in others if (o.recipe, o.seed, o.base, o.registration) == mine), None)
    if partner is None:
        raise Missing(f"the plain model of seed {one.seed} was not measured")
    a, b = (e.q("exceptions", e.amount("exceptions")) for e in (one, partner))
    return {"difference": a - b, "looped": a, "plain": b}


def decide(found: Mapping[str, Interval]) -> Verdict:
    """Standard rule."""
    return standard(found["difference"])
