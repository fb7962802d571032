"""Experiment 6 tests whether rankings are stable over calibration seeds, workloads and training seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bytecap_lab.thesis.evidence import Evidence
from bytecap_lab.thesis.statistics import (
    FALSIFIED,
    SUPPORTED,
    UNDECIDED,
    FloatArray,
    Interval,
    Missing,
    Verdict,
    kendall,
    taken,
)

ORDER, TITLE, KIND = 6, "Instability", "falsifier"
HYPOTHESIS = "Rankings are stable enough over seeds and workloads to act on."
STATISTIC = "0.10 minus the worst mean regret of acting on the ranking of another seed or workload"
NEEDS = ("base", "singles", "rankings", "paths")
MAIN, LINE = "margin", 0.0
MOST, LEAST = 0.10, 0.5  # regret, Kendall's tau
QUARTER = 0.25
DIMENSIONS = ("calibration seeds", "workloads", "training seeds")
Ranking = Mapping[str, float]


def effects(one: Evidence, others: Sequence[Evidence]) -> dict[str, FloatArray]:
    """Regret and tau of every dimension that was measured, and the margin to the worst."""
    own, foreign = one.line("rankings")["rankings"]["own"], _foreign(one, others)
    found = {}
    for name, rankings in foreign.items():
        regrets = [regret(one, r, own) for r in rankings]
        taus = [tau(r, own) for r in rankings]
        found[f"regret, {name}"] = np.mean(regrets, axis=0)
        found[f"tau, {name}"] = np.full(len(regrets[0]), float(np.mean(taus)))
    if not found:
        raise Missing("there is one calibration seed, one workload and one training seed")
    worst = np.max([v for k, v in found.items() if k.startswith("regret")], axis=0)
    return {"margin": MOST - worst, **found}


def _foreign(one: Evidence, others: Sequence[Evidence]) -> dict[str, list[Ranking]]:
    """Rankings that differ from the own one in one thing, by what that is."""
    rankings = one.line("rankings")["rankings"]
    siblings = [
        o for o in others
        if one.recipe and (o.recipe, o.base, o.registration) == (one.recipe, one.base, one.registration)
        and o.seed != one.seed and "rankings" in o.lines and "rankings" in o.lines["rankings"]
    ]  # fmt: skip
    found = (
        [r for k, r in rankings.items() if k.startswith("seed ")],
        [r for k, r in rankings.items() if k.startswith("text ")],
        [o.line("rankings")["rankings"]["own"] for o in siblings],
    )  # fmt: skip
    return {n: f for n, f in zip(DIMENSIONS, found, strict=True) if f}


def regret(one: Evidence, foreign: Ranking, own: Ranking) -> FloatArray:
    """Share of the own ranking's gain that is lost by acting on a foreign one."""
    singles = [s for s in one.line("singles")["exceptions"] if s["unit"] in foreign and s["unit"] in own]
    if len(singles) < 4:
        raise Missing("rankings have fewer than four matrices in common")
    size = np.array([max(1, s["bytes"]) for s in singles], float)
    gains = one.draw.means([s["kl"] for s in singles])
    mine, theirs = (
        gains @ taken(np.array([r[s["unit"]] for s in singles]), size, QUARTER * size.sum()) for r in (own, foreign)
    )
    found: FloatArray = 1 - theirs / np.where(mine > 0, mine, np.nan)
    return found


def tau(foreign: Ranking, own: Ranking) -> float:
    """Kendall's tau of two rankings over what they have in common."""
    both = [n for n in own if n in foreign]
    return kendall([own[n] for n in both], [foreign[n] for n in both])


def decide(found: Mapping[str, Interval]) -> Verdict:
    """Every dimension must be there and stable; one that is surely not decides."""
    regrets = {n: found[f"regret, {n}"] for n in DIMENSIONS if f"regret, {n}" in found}
    for name, r in regrets.items():
        if r.low > MOST:
            return FALSIFIED, f"regret over {name}"
    absent = [n for n in DIMENSIONS if n not in regrets]
    if absent:
        return UNDECIDED, f"not measured: {', '.join(absent)}"
    loose = [n for n, r in regrets.items() if r.high > MOST]
    if loose:
        return UNDECIDED, f"regret over {', '.join(loose)} may be above 10%"
    apart = [n for n in DIMENSIONS if not found[f"tau, {n}"].mean >= LEAST]
    return (UNDECIDED, f"Kendall's tau over {', '.join(apart)} is below {LEAST}") if apart else (SUPPORTED, "")


def details(one: Evidence, others: Sequence[Evidence]) -> list[tuple[str, str]]:
    """Agreement of the paths' order between texts and between training seeds."""
    del others
    found = one.line("paths")["paths"]
    ends = np.cumsum([len(t) for t in one.draw.tokens])[:-1]
    texts = one.texts["texts"] if one.texts is not None else []
    by = [[float(part.sum()) / p["bytes"] for p in found.values() for part in [np.split(np.array(p["kl"]), ends)[i]]]
          for i in range(len(texts))]  # fmt: skip
    rows = [
        ("paths by recovery per byte", ", ".join(sorted(found, key=lambda n: -sum(found[n]["kl"]) / found[n]["bytes"])))
    ]
    pairs = [(i, j) for i in range(len(by)) for j in range(i)]
    return rows + [
        (f"tau of paths, {texts[i]['name']} and {texts[j]['name']}", f"{kendall(by[i], by[j]):.2f}") for i, j in pairs
    ]
