"""Allocation against exact integer programming and brute force: never over, near the optimum, honest about the gap."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from bytecap.allocate import allocate, floor_rate, lower_hull
from bytecap.core import Curve, Point
from bytecap.errors import BudgetError
from bytecap.methods.waterfill import State
from bytecap.trim import allowed_slack, fit_to_cap

NUMBER = st.floats(0, 1000, allow_nan=False).map(lambda x: round(x, 3))
POINTS = st.lists(st.tuples(st.integers(0, 400), NUMBER), min_size=1, max_size=5)


def curves_of(raw):
    return [
        Curve(f"u{i}", tuple(Point(float(r), d, float(k)) for k, (r, d) in enumerate(points)))
        for i, points in enumerate(raw)
    ]


def optimum(curves, budget):
    """The best distortion by trying everything."""
    best = np.inf
    for combination in itertools.product(*(c.points for c in curves)):
        if sum(p.rate for p in combination) <= budget:
            best = min(best, sum(p.distortion for p in combination))
    return best


def integer_program(curves, budget):
    """The best distortion by branch and bound."""
    cost = np.array([p.distortion for c in curves for p in c.points])
    rate = np.array([p.rate for c in curves for p in c.points])
    one = np.zeros((len(curves), len(cost)))
    at = 0
    for i, c in enumerate(curves):
        one[i, at : at + len(c.points)] = 1
        at += len(c.points)
    found = milp(
        cost, integrality=np.ones(len(cost)), bounds=Bounds(0, 1), options={"mip_rel_gap": 1e-7},
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(rate[None], -np.inf, budget)],
    )  # fmt: skip
    assert found.success
    return found.fun


def check_plan(plan, curves, budget):
    chosen = [plan.choice[c.name] for c in curves]
    assert set(plan.choice) == {c.name for c in curves}
    assert all(p in c.points for c, p in zip(curves, chosen, strict=True))
    assert plan.rate == pytest.approx(sum(p.rate for p in chosen))
    assert plan.distortion == pytest.approx(sum(p.distortion for p in chosen))
    assert plan.rate <= budget
    assert plan.slope >= 0
    assert plan.gap >= 0


def convex_curves(count, points=10, seed=0):
    """Units as coders give them: distortion falls fourfold for every bit a weight."""
    rng = np.random.default_rng(seed)
    curves = []
    for i in range(count):
        size, scale = rng.integers(200, 20_000), 10 ** rng.uniform(-4, -1)
        bits = np.linspace(1, 5, points)
        noise = 1 + 0.01 * rng.normal(size=points)
        curves.append(
            Curve(f"u{i}", tuple(
                Point(float(round(size * b / 8)), float(scale * 4.0**-b * n), float(b))
                for b, n in zip(bits, noise, strict=True)
            ))
        )  # fmt: skip
    return curves


class TestAgainstBruteForce:
    @settings(max_examples=150)
    @given(st.lists(POINTS, min_size=1, max_size=4), st.floats(0, 1))
    def test_feasible_and_no_further_from_the_optimum_than_the_gap(self, raw, share):
        curves = curves_of(raw)
        floor, top = floor_rate(curves), sum(max(p.rate for p in c.points) for c in curves)
        budget = floor + share * (top - floor)
        plan = allocate(curves, budget)
        check_plan(plan, curves, budget)
        best = optimum(curves, budget)
        assert best - 1e-9 <= plan.distortion <= best + plan.gap + 1e-9

    @given(st.lists(POINTS, min_size=1, max_size=4))
    def test_an_ample_budget_takes_the_best_of_everything(self, raw):
        curves = curves_of(raw)
        plan = allocate(curves, 1e9)
        assert plan.distortion == pytest.approx(sum(min(p.distortion for p in c.points) for c in curves))
        assert plan.gap == pytest.approx(0, abs=1e-9)

    @given(st.lists(POINTS, min_size=1, max_size=4))
    def test_the_floor_is_reachable_and_one_byte_less_is_not(self, raw):
        curves = curves_of(raw)
        floor = floor_rate(curves)
        check_plan(allocate(curves, floor), curves, floor)
        with pytest.raises(BudgetError, match=str(int(floor))) as caught:
            allocate(curves, floor - 1)
        assert caught.value.floor == floor


class TestAgainstIntegerProgramming:
    @settings(max_examples=12)
    @given(st.integers(0, 10_000), st.integers(5, 40), st.floats(0.05, 0.95))
    def test_arbitrary_points(self, seed, count, share):
        rng = np.random.default_rng(seed)
        raw = [
            [(int(r), float(d)) for r, d in zip(rng.integers(1, 300, 6), rng.random(6), strict=True)]
            for _ in range(count)
        ]
        curves = curves_of(raw)
        floor, top = floor_rate(curves), sum(max(p.rate for p in c.points) for c in curves)
        budget = floor + share * (top - floor)
        plan = allocate(curves, budget)
        check_plan(plan, curves, budget)
        best = integer_program(curves, budget)
        assert best - 1e-5 <= plan.distortion <= best + plan.gap + 1e-5

    @pytest.mark.parametrize("bits", [1.5, 2.5, 3.5])
    def test_many_convex_units_come_within_a_thousandth(self, bits):
        curves = convex_curves(80, points=33)  # an eighth of a bit apart
        budget = sum(c.points[-1].rate for c in curves) * bits / 5
        plan = allocate(curves, budget)
        check_plan(plan, curves, budget)
        best = integer_program(curves, budget)
        assert plan.distortion <= best * 1.001
        assert plan.gap <= 0.002 * plan.distortion

    def test_the_gap_of_thousands_of_units_is_tiny(self):
        curves = convex_curves(3000)
        budget = sum(c.points[-1].rate for c in curves) * 0.6
        plan = allocate(curves, budget)
        check_plan(plan, curves, budget)
        assert plan.gap <= 2e-5 * plan.distortion
        assert budget - plan.rate < 300


class TestShape:
    @given(POINTS)
    def test_the_hull_is_convex_and_below_every_point(self, raw):
        points = curves_of([raw])[0].points
        hull = lower_hull(points)
        assert set(hull) <= set(points)
        rates, distortions = [p.rate for p in hull], [p.distortion for p in hull]
        assert rates == sorted(set(rates))
        assert distortions == sorted(set(distortions), reverse=True)
        slopes = [(b.distortion - a.distortion) / (b.rate - a.rate) for a, b in itertools.pairwise(hull)]
        assert slopes == sorted(slopes)
        for p in points:
            if rates[0] <= p.rate <= rates[-1]:
                assert p.distortion >= np.interp(p.rate, rates, distortions) - 1e-9
            assert p.distortion >= distortions[-1]
            assert p.rate >= rates[0]

    @given(st.lists(POINTS, min_size=1, max_size=5), st.lists(st.floats(0, 1), min_size=2, max_size=2))
    def test_the_slope_falls_as_the_budget_grows(self, raw, shares):
        curves = curves_of(raw)
        floor, top = floor_rate(curves), sum(max(p.rate for p in c.points) for c in curves)
        low, high = (allocate(curves, floor + s * (top - floor)) for s in sorted(shares))
        assert low.slope >= high.slope

    def test_the_slope_is_what_a_byte_buys(self):
        curves = convex_curves(400, points=40)
        budget = sum(c.points[-1].rate for c in curves) * 0.6
        less, more = allocate(curves, budget), allocate(curves, budget * 1.002)
        bought = (less.distortion - more.distortion) / (more.rate - less.rate)
        assert bought == pytest.approx(less.slope, rel=0.05)

    def test_one_unit_with_one_point(self):
        plan = allocate([Curve("a", (Point(7, 0.5, 1),))], 7)
        assert (plan.rate, plan.distortion, plan.slope, plan.gap) == (7, 0.5, 0, 0)

    def test_without_units_nothing_is_spent(self):
        plan = allocate([], 5)
        assert (plan.rate, plan.distortion) == (0, 0)


class Slow:
    """A planner of one unit that shrinks five times more slowly with its step than a usual one."""

    parameters, matrices = 100_000, ()

    def settle(self, steps, *, refit):
        assert not refit
        return State(dict(steps), {}, None, {}, {})

    def encode(self, state):
        return {"a": (1, bytes(round(20_000 - 3000 * math.log(state.steps["a"]))))}


def test_trimming_measures_how_fast_the_file_shrinks():
    planner = Slow()
    state = planner.settle({"a": 1.0}, refit=False)
    packed = fit_to_cap(planner, state, b"", lambda sections, _: len(sections["a"].data), 19_000)
    assert 19_000 - 2 * allowed_slack(19_000) <= len(packed.sections["a"].data) <= 19_000
