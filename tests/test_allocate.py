"""Allocation against exact integer programming and brute force: never over, near the optimum, honest about the gap."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from bytecap.allocation.allocate import _pchip, allocate, floor_rate, lower_hull, refine
from bytecap.allocation.planner import State
from bytecap.errors import BudgetError
from bytecap.job import Section
from bytecap.methods.rate_control import allowed_slack, fit_to_cap
from bytecap.types import Curve, Point

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


A = ((0, 9), (4, 1), (8, 0.5))  # slopes 2 and 0.125
B = ((0, 4), (4, 3))  # slope 0.25


class TestByHand:
    """Plans small enough to be worked out on paper."""

    @pytest.mark.parametrize(
        ("points", "kept"),
        [
            (((5, 1),), ((5, 1),)),
            (((0, 9), (4, 1), (8, 0.5)), ((0, 9), (4, 1), (8, 0.5))),
            (((0, 9), (0, 8), (4, 1)), ((0, 8), (4, 1))),  # one point of a rate
            (((0, 9), (4, 1), (6, 1), (8, 2)), ((0, 9), (4, 1))),  # more bytes for nothing
            (((0, 9), (1, 8), (2, 7), (3, 6)), ((0, 9), (3, 6))),  # on a line
            (((0, 10), (3, 9), (10, 0)), ((0, 10), (10, 0))),  # above one
            (((8, 0), (6, 5), (4, 6), (0, 10)), ((0, 10), (8, 0))),
            (((0, 10), (1, 9), (2, 7), (3, 4), (4, 0)), ((0, 10), (4, 0))),
            (((0, 10), (1, 5), (2, 4), (3, 2)), ((0, 10), (1, 5), (3, 2))),
        ],
    )
    def test_hulls(self, points, kept):
        (curve,) = curves_of([points])
        assert [(p.rate, p.distortion) for p in lower_hull(curve.points)] == list(kept)
        assert [(p.rate, p.distortion) for p in lower_hull(curve.points[::-1])] == list(kept)

    @pytest.mark.parametrize(
        ("budget", "rates", "slope", "bound"),
        [
            (0, (0, 0), 2.0, 13), (3.9, (0, 0), 2.0, 5.2), (4, (4, 0), 0.25, 5), (7, (4, 0), 0.25, 4.25),
            (8, (4, 4), 0.125, 4), (8.5, (4, 4), 0.125, 3.9375), (12, (8, 4), 0, 3.5), (99, (8, 4), 0, 3.5),
        ],
    )  # fmt: skip
    def test_two_units(self, budget, rates, slope, bound):
        curves = curves_of([A, B])
        plan = allocate(curves, budget)
        assert tuple(plan.choice[c.name].rate for c in curves) == rates
        assert plan.rate == sum(rates)
        assert plan.distortion == dict(A)[rates[0]] + dict(B)[rates[1]]
        assert plan.slope == slope
        assert plan.gap == pytest.approx(plan.distortion - bound)

    def test_what_is_left_buys_points_above_the_hull(self):
        plan = allocate(curves_of([((0, 10), (3, 9), (10, 0))]), 3)
        assert (plan.rate, plan.distortion, plan.slope, plan.gap) == (3, 9, 1, 2)

    def test_the_steepest_first_and_the_larger_of_equals(self):
        steep, flat = ((0, 5), (2, 4.25), (40, -15)), ((0, 5), (2, 4.5), (40, -15))
        for raw in ([steep, flat], [flat, steep]):
            assert allocate(curves_of(raw), 3).distortion == 9.25
            assert allocate(curves_of(raw), 4).distortion == 8.75
        large, small = ((0, 10), (3, 9.25), (40, -10)), ((0, 5), (2, 4.5), (40, -15))
        for raw in ([large, small], [small, large]):
            assert allocate(curves_of(raw), 4).distortion == 14.25
            assert allocate(curves_of(raw), 5).distortion == 13.75
            assert allocate(curves_of(raw), 2).distortion == 14.5

        steep, large = ((0, 5), (1, 4.5), (40, -35)), ((0, 5), (3, 4.1), (40, -35))
        for raw in ([steep, large], [large, steep]):
            assert allocate(curves_of(raw), 3).distortion == 9.5

    def test_of_two_equal_units_the_first_is_served(self):
        plan = allocate(curves_of([((0, 5), (2, 4.5), (40, -35))] * 2), 3)
        assert [plan.choice[n].rate for n in ("u0", "u1")] == [2, 0]

    def test_improvements_cost_their_difference(self):
        raw = [((1, 20), (3, 18), (40, -80)), ((1, 20), (3, 18.5), (40, -80))]
        assert allocate(curves_of(raw), 6).distortion == 36.5

    def test_one_point_after_the_other(self):
        """The cost of an improvement is counted from where the unit is."""
        raw = [((1, 20), (3, 17), (4, 16.5), (5, 15.9), (30, -20))]
        spent = {b: allocate(curves_of(raw), b).distortion for b in (1, 2, 3, 4, 5)}
        assert spent == {1: 20, 2: 20, 3: 17, 4: 16.5, 5: 15.9}

    def test_the_floor(self):
        curves = curves_of([((3, 1), (2, 5)), ((7.5, 1),)])
        assert floor_rate(curves) == 9.5
        assert allocate(curves, 9.5).rate == 9.5
        with pytest.raises(BudgetError, match="at least 10 bytes, 9 are left") as caught:
            allocate(curves, 9.4)
        assert caught.value.floor == 10

    def test_the_gap_is_never_negative(self):
        curves = curves_of([((0, 0.1), (3, 0.1 / 3), (7, 0.01))] * 3)
        assert all(allocate(curves, b).gap >= 0 for b in np.linspace(0, 21, 64))


class TestBetweenMeasuredPoints:
    def test_cubics_by_hand(self):
        x, y = np.arange(3.0), np.array([0.0, 1, 4])
        at = np.array([0, 0.5, 1, 1.5, 2])
        np.testing.assert_allclose(_pchip(x, y, at), [0, 0.4375, 1, 2.3125, 4], rtol=1e-12)
        np.testing.assert_allclose(_pchip(x, np.array([0.0, 1, 0]), at), [0, 0.625, 1, 0.625, 0], atol=1e-12)
        small = _pchip(x, np.array([0, 0.5, 1.5]), at), _pchip(x, np.array([0, 0.5, 0]), at)
        np.testing.assert_allclose(small[0][1], 0.0625 + 0.25 - 1 / 12)
        np.testing.assert_allclose(small[1][1], 0.3125)
        longer = _pchip(np.arange(4.0), np.array([0.0, 1, 4, 9]), np.array([1.5, 2.5]))
        np.testing.assert_allclose(longer, [2.21875, 6.34375])
        falling = _pchip(np.arange(4.0), np.array([0.0, 1, 0, -1]), np.array([1.5, 2.5]))
        np.testing.assert_allclose(falling, [0.625, -0.5])
        uneven = _pchip(np.array([0.0, 1, 3]), np.array([0.0, 1, 5]), np.array([2.0, 3.0]))
        np.testing.assert_allclose(uneven, [17 / 6, 5], rtol=1e-12)
        np.testing.assert_allclose(_pchip(x, 3 - 2 * x, at), 3 - 2 * at, rtol=1e-12)
        np.testing.assert_allclose(_pchip(x, np.zeros(3), at), 0)

    def test_refined_curves(self):
        points = tuple(Point(r, d, s) for r, d, s in ((40, 1.0, 3.0), (90, 0.25, 1.5), (60, 0.5, 2.0)))
        curve = refine(Curve("u", points), 3.0)
        assert curve.name == "u"
        assert [p.setting for p in curve.points] == [1.5 + i / 16 for i in range(25)]
        found = {p.setting: (p.rate, p.distortion) for p in curve.points}
        for p in points:
            assert found[p.setting] == pytest.approx((p.rate, 3 * p.distortion))
        rates, logs = [p.rate for p in curve.points], np.log([p.distortion for p in curve.points])
        assert rates == sorted(rates, reverse=True)
        assert all(a < b for a, b in itertools.pairwise(logs))
        wanted = _pchip(np.array([1.5, 2, 3]), np.log([0.25, 0.5, 1.0]), np.array([1.75, 2.5]))
        assert [found[1.75][1], found[2.5][1]] == pytest.approx(list(3 * np.exp(wanted)))
        assert found[2.5][0] == pytest.approx(
            _pchip(np.array([1.5, 2, 3]), np.array([90.0, 60, 40]), np.array([2.5]))[0]
        )

    def test_without_distortion(self):
        curve = refine(Curve("u", (Point(9, 0.0, 0.0), Point(4, 1.0, 1.0))), 2.0)
        assert curve.points[0].distortion == pytest.approx(2e-15)


class TestAgainstBruteForce:
    @pytest.mark.slow
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

    @pytest.mark.slow
    @pytest.mark.parametrize("bits", [1.5, 2.5, 3.5])
    def test_many_convex_units_come_within_a_thousandth(self, bits):
        curves = convex_curves(80, points=33)  # an eighth of a bit apart
        budget = sum(c.points[-1].rate for c in curves) * bits / 5
        plan = allocate(curves, budget)
        check_plan(plan, curves, budget)
        best = integer_program(curves, budget)
        assert plan.distortion <= best * 1.001
        assert plan.gap <= 0.002 * plan.distortion

    @pytest.mark.slow
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

    def settle(self, steps, _rules, *, refit):
        assert not refit
        return State(dict(steps), {}, None, {}, {})

    def sections(self, state):
        return {"a": Section(1, bytes(round(20_000 - 3000 * math.log(state.steps["a"]))))}


def test_trimming_measures_how_fast_the_file_shrinks():
    planner = Slow()
    state = planner.settle({"a": 1.0}, None, refit=False)
    packed = fit_to_cap(planner, state, b"", lambda sections, _: len(sections["a"].data), 19_000)
    assert 19_000 - 2 * allowed_slack(19_000) <= len(packed.sections["a"].data) <= 19_000
