"""Experiment 5 tests whether return per byte is concentrated enough for a win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bytecap_lab.thesis.evidence import Evidence
from bytecap_lab.thesis.statistics import THRESHOLD, FloatArray, Interval, Missing, Verdict, standard, taken

ORDER, TITLE, KIND = 5, "Diffuseness", "falsifier"
HYPOTHESIS = "Return per byte is concentrated enough for a win."
STATISTIC = "return per byte of the best quarter of exceptions, cross-fitted, over that of finer steps, minus 1"
NEEDS = ("base", "singles")
MAIN, LINE = "lead", THRESHOLD
QUARTER = 0.25
_SPLITS = 20
_TENTHS = np.linspace(0, 1, 11)


def effects(one: Evidence, others: Sequence[Evidence]) -> dict[str, FloatArray]:
    """Lead of the best quarter; Gini coefficient and shares beside it, all cross-fitted."""
    del others
    parts = [quarter(one, a, b) for a, b in halvings(one)]
    if not parts:
        raise Missing("there are too few documents to halve")
    return {k: np.mean([p[k] for p in parts], axis=0) for k in parts[0]}


def halvings(one: Evidence) -> list[tuple[list[npt.NDArray[np.bool_]], list[npt.NDArray[np.bool_]]]]:
    """Random halves of every text's documents, in both directions."""
    rng, found = np.random.default_rng(5), []
    for _ in range(_SPLITS):
        first = [rng.permutation(len(t)) < len(t) // 2 for t in one.draw.tokens]
        second = [~m for m in first]
        if any(m.any() for m in first):
            found += [(first, second), (second, first)]
    return found


def quarter(
    one: Evidence, a: Sequence[npt.NDArray[np.bool_]], b: Sequence[npt.NDArray[np.bool_]]
) -> dict[str, FloatArray]:
    """Units ranked on half `a`, everything read off half `b`."""
    line = one.line("singles")
    if len(line["exceptions"]) < 4:
        raise Missing("fewer than four matrices have an exception near 2% of their section")
    size = np.array([max(1, s["bytes"]) for s in line["exceptions"]], float)
    sums = [s["kl"] for s in line["exceptions"]]
    ranked, gains = one.draw.means(sums, a) / size, one.draw.means(sums, b)
    finer = one.draw.means([s["kl"] for s in line["steps"]], b).sum(1) / sum(max(1, s["bytes"]) for s in line["steps"])
    best = (taken(ranked, size, QUARTER * size.sum()) * gains).sum(1)
    whole = gains.sum(1)
    rival = np.where(finer > 0, finer, np.nan)
    total = np.where(whole > 0, whole, np.nan)
    return {
        "lead": best / (QUARTER * size.sum()) / rival - 1, "gini": gini(ranked, size, gains, total),
        "share of the best quarter": best / total, "share needed": QUARTER * size.sum() * finer / total,
    }  # fmt: skip


def gini(ranked: FloatArray, size: FloatArray, gains: FloatArray, total: FloatArray) -> FloatArray:
    """Twice the area between the concentration curve and the diagonal, per row.

    >>> one = np.array([[2.0, 1.0]])
    >>> gini(one, np.ones(2), np.array([[1.0, 0.0]]), np.ones(1)).tolist()
    [0.5]
    """
    order = np.argsort(-ranked, axis=1, kind="stable")
    p = size[order] / size.sum()
    part = np.take_along_axis(gains, order, 1) / total[:, None]
    area: FloatArray = ((np.cumsum(part, 1) - part / 2) * p).sum(1)
    return 2 * area - 1


def decide(found: Mapping[str, Interval]) -> Verdict:
    """Standard rule on the lead."""
    return standard(found["lead"])


def lorenz(one: Evidence) -> list[tuple[float, float]]:
    """Share of the gain that the best share of the bytes has, cross-fitted, at every tenth."""
    line, rows = one.line("singles"), []
    size = np.array([max(1, s["bytes"]) for s in line["exceptions"]], float)
    sums = [s["kl"] for s in line["exceptions"]]
    for a, b in halvings(one):
        ranked, gains = one.draw.means(sums, a)[0] / size, one.draw.means(sums, b)[0]
        rows.append([float((taken(ranked, size, t * size.sum()) * gains).sum() / gains.sum()) for t in _TENTHS])
    return [(float(t), float(v)) for t, v in zip(_TENTHS, np.mean(rows, axis=0), strict=True)]


def details(one: Evidence, others: Sequence[Evidence]) -> list[tuple[str, str]]:
    """The Lorenz curve."""
    del others
    return [(f"best {t:.0%} of the bytes", f"{v:.1%} of the gain") for t, v in lorenz(one)[1:-1]]
