"""Allocate a budget with one slope for the whole model: lower hulls, bisection, fill, and a certificate.

Minimise the summed distortion over one point per curve with the summed rate under a budget: a multiple-choice
knapsack. For a slope (nats per byte) every curve takes the point that minimises `distortion + slope * rate`,
which is always on its lower convex hull; the slope is bisected until the rates fit, then bytes left over buy
the steepest improvements among all points, hull or not. The Lagrangian bound at the final slope says how far
the plan can be from the optimum, so the plan carries its own certificate.

Source: Shoham & Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE TASSP 1988.
Pure functions on plain data. Omitted: exact integer programming, which tests use as the oracle.

>>> a = Curve("a", (Point(0, 9.0, 0), Point(4, 1.0, 1), Point(8, 0.5, 2)))
>>> b = Curve("b", (Point(0, 4.0, 0), Point(4, 3.0, 1)))
>>> plan = allocate([a, b], 8)
>>> plan.choice["a"].setting, plan.choice["b"].setting, plan.distortion
(1, 1, 4.0)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import BudgetError
from bytecap.types import Curve, Plan, Point


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Return the points on the lower convex hull of (rate, distortion), by rising rate."""
    hull: list[Point] = []
    for p in sorted(points, key=lambda p: (p.rate, p.distortion)):
        if hull and (p.rate == hull[-1].rate or p.distortion >= hull[-1].distortion):
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], p):
            hull.pop()
        hull.append(p)
    return hull


def _slope(a: Point, b: Point) -> float:
    """Return the distortion that a byte buys on the way from a to b."""
    return (a.distortion - b.distortion) / (b.rate - a.rate)


def floor_rate(curves: Sequence[Curve]) -> float:
    """Return the smallest reachable rate in bytes."""
    return sum(min(p.rate for p in c.points) for c in curves)


def _at_slope(hulls: Sequence[Sequence[Point]], slope: float) -> list[int]:
    """Return the index on every hull of the best point at a slope."""
    chosen = []
    for hull in hulls:
        i = 0
        while i + 1 < len(hull) and _slope(hull[i], hull[i + 1]) > slope:
            i += 1
        chosen.append(i)
    return chosen


def allocate(curves: Sequence[Curve], budget: float) -> Plan:
    """Choose one point per curve with summed rate at most `budget`.

    Args:
        curves: one per unit, each with at least one point; rates in bytes, distortions in nats per token.
        budget: bytes for all of them.

    Raises:
        BudgetError: even the cheapest points exceed the budget; `.floor` is their sum.
    """
    floor = floor_rate(curves)
    if floor > budget:
        raise BudgetError(
            f"the units need at least {floor:.0f} bytes, {budget:.0f} are left for them", math.ceil(floor)
        )
    hulls = [lower_hull(c.points) for c in curves]
    slopes = sorted({0.0} | {_slope(a, b) for h in hulls for a, b in pairwise(h)})
    low, high = 0, len(slopes) - 1  # taking every step steeper than slopes[i] fits for all i >= high
    while low < high:
        middle = (low + high) // 2
        chosen = _at_slope(hulls, slopes[middle])
        if sum(h[i].rate for h, i in zip(hulls, chosen, strict=True)) <= budget:
            high = middle
        else:
            low = middle + 1
    slope = slopes[high]  # steps of exactly this slope no longer fit: the exchange rate at the margin; 0 if all fit
    chosen_points = [h[i] for h, i in zip(hulls, _at_slope(hulls, slope), strict=True)]
    bound = _bound(hulls, slope, budget)
    filled = _fill(curves, chosen_points, budget)
    distortion = sum(p.distortion for p in filled)
    return Plan(
        {c.name: p for c, p in zip(curves, filled, strict=True)}, sum(p.rate for p in filled), distortion,
        slope, max(0.0, distortion - bound),
    )  # fmt: skip


def _bound(hulls: Sequence[Sequence[Point]], slope: float, budget: float) -> float:
    """Return the Lagrangian lower bound on the distortion of any plan within the budget."""
    best = sum(min(p.distortion + slope * p.rate for p in hull) for hull in hulls)
    return best - slope * budget


def _fill(curves: Sequence[Curve], chosen: list[Point], budget: float) -> list[Point]:
    """Spend the rest of the budget, always on the steepest improvement that fits, on the hull or not."""
    chosen = list(chosen)
    left = budget - sum(p.rate for p in chosen)
    while True:
        best: tuple[float, int, Point] | None = None
        for i, curve in enumerate(curves):
            now = chosen[i]
            for p in curve.points:
                if p.distortion >= now.distortion or p.rate - now.rate > left:
                    continue
                gain = math.inf if p.rate <= now.rate else _slope(now, p)
                if best is None or (gain, now.distortion - p.distortion) > (
                    best[0],
                    chosen[best[1]].distortion - best[2].distortion,
                ):
                    best = (gain, i, p)
        if best is None:
            return chosen
        left -= best[2].rate - chosen[best[1]].rate
        chosen[best[1]] = best[2]


def refine(curve: Curve, kappa: float) -> Curve:
    """Interpolate points every sixteenth of an octave between measured ones, monotonically in the logarithm.

    Args:
        curve: points of one kind; `setting` is an octave.
        kappa: factor of all distortions.
    """
    measured = sorted(curve.points, key=lambda p: p.setting)
    if len(measured) == 1:
        return Curve(curve.name, (replace(measured[0], distortion=kappa * measured[0].distortion),))
    x = np.array([p.setting for p in measured])
    fine = np.linspace(x[0], x[-1], round(float(x[-1] - x[0]) * 16) + 1)
    rate = _pchip(x, np.array([p.rate for p in measured]), fine)
    log_d = _pchip(x, np.log(np.maximum([p.distortion for p in measured], 1e-15)), fine)
    points = tuple(
        replace(measured[0], rate=float(r), distortion=float(kappa * np.exp(d)), setting=float(s))
        for r, d, s in zip(rate, log_d, fine, strict=True)
    )
    return Curve(curve.name, points)


def _pchip(x: npt.NDArray[Any], y: npt.NDArray[Any], at: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Interpolate cubically, preserving shape (Fritsch-Carlson slopes)."""
    h, d = np.diff(x), np.diff(y) / np.diff(x)
    m = np.concatenate(
        [[d[0]], np.where(d[:-1] * d[1:] > 0, 2 * d[:-1] * d[1:] / (d[:-1] + d[1:] + 1e-300), 0), [d[-1]]]
    )
    i = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(h) - 1)
    t = (at - x[i]) / h[i]
    result: npt.NDArray[Any] = (
        (1 + 2 * t) * (1 - t) ** 2 * y[i] + t * (1 - t) ** 2 * h[i] * m[i]
        + t**2 * (3 - 2 * t) * y[i + 1] + t**2 * (t - 1) * h[i] * m[i + 1]
    )  # fmt: skip
    return result
