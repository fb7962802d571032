"""Let overlays compete: measure one curve a unit over base step, overlay and amount, and allocate at one slope.

Around a settled plan every unit is measured as it is and under each overlay of the menu, at several base steps: its
worth depends on the base below it. First all amounts of an overlay at the plan's own step (ranked by the values
that the base decodes there); the few that come closest to the plan's slope then at coarser and finer steps. Bytes are
estimated code lengths plus the overlay's real bytes and what `stack` adds; distortions are those of base and overlay
together, decoded, in the unit's metric, times the unit's correction factor. `bytecap.allocation.allocate` chooses among
all.

An overlay that keeps something once for the whole file is charged for it once: the plan is solved with and without it.
None of today's overlays does (`charge` is 0).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bytecap.allocation import correction
from bytecap.allocation.allocate import allocate, floor_rate, refine
from bytecap.allocation.decoded import decode_coded
from bytecap.allocation.overlaid import OverlaidUnit, overlaid, problem_of
from bytecap.allocation.planner import Planner, State, finest_step
from bytecap.allocation.shared_channels import one_list
from bytecap.calibration.residual_streams import ResidualStream
from bytecap.format.coders import Shared
from bytecap.progress import Advance
from bytecap.quantization.overlays import Ranking, UnitProblem, check_names, overlays, thinned
from bytecap.quantization.overlays.channels import OVERLAY as CHANNELS_OVERLAY
from bytecap.quantization.overlays.channels import rank
from bytecap.quantization.quantizer import Coded, Prepared, rate
from bytecap.sizes import in_groups
from bytecap.types import Curve, Plan, Point

DEFAULT: tuple[str, ...] = ()  # what measured best: nothing, see LOG.md
ALL = "all"
CHANNELS = CHANNELS_OVERLAY.id  # whose amounts are chosen for all matrices of a stream, so none is dropped early
LABEL = "paths"  # of the plan over a menu
PLAIN = (-1.0, -0.5, 0.0, 0.5, 1.0)  # octaves of the step without an overlay
UNDER = (-0.5, 0.0, 0.5, 1.0)  # and under an overlay
_MOST_SETTINGS = 8  # amounts of an overlay tried on a unit
_KEPT = 2  # of them tried at other steps
_VALUES = 2**22  # weights measured together


def known(names: Iterable[str] | None) -> tuple[str, ...]:
    """Return the overlays of these names; the default menu if None, every overlay if one of them is `all`.

    Raises:
        UsageError: unknown; the message suggests the nearest one.

    >>> known(["rows", "columns", "rows"]), known(None)
    (('rows', 'columns'), ())
    """
    if names is None:
        return DEFAULT
    wanted = tuple(dict.fromkeys(names))
    every = sorted(overlays())
    check_names(wanted, [*every, ALL])
    return tuple(every) if ALL in wanted else wanted


@dataclass(frozen=True)
class Choice(Point):
    """A point that knows its overlay; `setting` is the base's step in octaves off the plan's."""

    path: str = ""
    amount: Any = None


@dataclass
class Menu:
    """The choices around a settled plan.

    Attributes:
        planner: the units.
        start: the settled plan.
        kappa: correction factor of every unit.
        capacity: bytes for all units.
        names: of overlays.
        streams: of the model, for overlays that serve several matrices at once.
        curves: one for each unit, once measured.
        skipped: how many matrices an overlay cannot serve.
    """

    planner: Planner
    start: State
    kappa: Mapping[str, float]
    capacity: float
    names: Sequence[str]
    streams: Sequence[ResidualStream] = ()
    curves: list[Curve] = field(init=False)
    skipped: dict[str, int] = field(init=False)

    def measure(self, advance: Advance) -> None:
        """Measure everything; `advance` is called with the share that is done."""
        planner, start = self.planner, self.start
        states = {
            o: planner.settle({n: s * 2**o for n, s in start.steps.items()}, start.rules, refit=False) if o else start
            for o in PLAIN
        }
        plain = {n: [Choice(s.rates[n], s.distortions[n], o) for o, s in states.items()] for n in planner.names}
        for item in planner.matrices:
            if _servable(item):
                name, problem = item.unit.name, problem_of(item)
                found = [_distortion(problem, s.coded[name], s.shared) for s in states.values()]
                plain[name] = [replace(p, distortion=d) for p, d in zip(plain[name], found, strict=True)]
        kappa = self._scaled({n: p[PLAIN.index(0.0)].distortion for n, p in plain.items()})
        fine = {n: refine(Curve(n, tuple(p)), kappa[n]) for n, p in plain.items()}
        slope = allocate(list(fine.values()), max(self.capacity, floor_rate(list(fine.values())))).slope
        rankings = self._rankings(kappa)
        self.skipped = dict.fromkeys(self.names, 0)
        candidates: dict[str, list[Curve]] = {n: [] for n in planner.names}
        whole = sum(p.unit.parameters for p in planner.matrices) * max(1, len(self.names))
        for items in in_groups(planner.matrices, lambda p: p.unit.parameters, _VALUES):
            bench = _Bench(planner, start, states, {p.unit.name: p for p in items}, kappa, slope, rankings)
            for name in self.names:
                served = bench.candidates(name)
                self.skipped[name] += len(items) - len(served)
                for unit, curves in served.items():
                    candidates[unit] += curves
                advance(sum(p.unit.parameters for p in items) / whole)
        self.curves = [
            Curve(n, tuple(p for c in (fine[n], *candidates[n]) for p in c.points)) for n in planner.names
        ]  # fmt: skip

    def _rankings(self, kappa: Mapping[str, float]) -> dict[str, tuple[Ranking, ...]]:
        """Rank the channels of every stream over all its matrices at the plan."""
        coded, shared = self.start.coded, self.start.shared
        known = ((problem_of(p), torch.from_numpy(decode_coded(coded[p.unit.name], shared)))
                 for p in self.planner.matrices if _servable(p))  # fmt: skip
        return rank(self.streams, known, kappa) if CHANNELS in self.names else {}

    def _scaled(self, true: Mapping[str, float]) -> dict[str, float]:
        """Return factors for distortions in the whole metric, which a base without error feedback ignores."""
        found = dict(self.kappa)
        for names in correction.roles(self.planner).values():
            seen, real = (sum(d[n] for n in names) for d in (self.start.distortions, true))
            found |= {n: self.kappa[n] * seen / real for n in names if real > 0}
        return found

    def solve(self) -> Plan:
        """Solve for the plan over all choices, one list a stream; overlays with a charge are also left out."""
        charges = {n: overlays()[n].charge for n in self.names}
        plan = solve(self.curves, self.capacity, charges)
        joint = one_list(self.curves, plan.slope)
        return plan if joint == self.curves else solve(joint, self.capacity, charges)

    def planned(self, plan: Plan) -> tuple[Planner, dict[str, float]]:
        """Return a planner whose units are under their chosen overlays, and every unit's step."""
        planner = self.planner
        amounts = {n: p for n, p in plan.choice.items() if isinstance(p, Choice) and p.path}
        matrices = [
            overlaid(p, problem_of(p), overlays()[c.path], c.amount, planner.options)
            if (c := amounts.get(p.unit.name)) else p for p in planner.matrices
        ]  # fmt: skip
        changed = Planner.of(matrices, planner.vectors, planner.options)
        return changed, {n: self.start.steps[n] * 2.0**p.setting for n, p in plan.choice.items()}


@dataclass
class _Bench:
    """Some matrices, with all that trying overlays on them needs."""

    planner: Planner
    start: State
    states: Mapping[float, State]
    items: Mapping[str, Prepared]
    kappa: Mapping[str, float]
    slope: float
    rankings: Mapping[str, tuple[Ranking, ...]]
    problems: dict[str, UnitProblem] = field(init=False)

    def __post_init__(self) -> None:
        self.problems = {
            n: replace(problem_of(p), rankings=self.rankings.get(n, ())) for n, p in self.items.items() if _servable(p)
        }

    def candidates(self, name: str) -> dict[str, list[Curve]]:
        """Return refined curves of the best amounts of an overlay by unit, without the units it cannot serve."""
        path, settings_of = overlays()[name], {}
        for unit, problem in self.problems.items():
            base = torch.from_numpy(decode_coded(self.start.coded[unit], self.start.shared))
            settings = thinned(path.settings(problem, base), _MOST_SETTINGS)
            if settings:
                settings_of[unit] = settings
        tried: dict[str, list[Choice]] = {n: [] for n in settings_of}
        for number in range(max((len(x) for x in settings_of.values()), default=0)):
            items = [self._under(n, name, x[number]) for n, x in settings_of.items() if number < len(x)]
            for unit, point in self._at(items, 0.0, name).items():
                tried[unit].append(point)
        points: dict[str, list[list[Choice]]] = {}
        for unit, found in tried.items():
            ordered = sorted(found, key=lambda p, unit=unit: self._cost(unit, p))  # type: ignore[misc]
            points[unit] = [[p] for p in (ordered if name == CHANNELS else ordered[:_KEPT])]
        for kept in range(_KEPT):
            some = {n: p[kept][0] for n, p in points.items() if kept < len(p)}
            items = [self._under(n, name, p.amount) for n, p in some.items()]
            for offset in (o for o in UNDER if o):
                for unit, point in self._at(items, offset, name).items():
                    points[unit][kept].append(point)
        return {n: [refine(Curve(n, tuple(p)), self.kappa[n]) for p in found] for n, found in points.items()}

    def _under(self, unit: str, name: str, amount: Any) -> OverlaidUnit:
        return overlaid(self.items[unit], self.problems[unit], overlays()[name], amount, self.planner.options)

    def _at(self, items: Sequence[OverlaidUnit], offset: float, name: str) -> dict[str, Choice]:
        """Measure units under an overlay at the plan's step times `2^offset`."""
        shared, below = self.start.shared, self.states[offset]
        fresh = [p for p in items if not p.same_base]
        steps = {
            p.unit.name: max(self.start.steps[p.unit.name] * 2.0**offset, finest_step(p)) for p in fresh
        }  # fmt: skip
        coded = self.planner.round(fresh, steps, self.start.rules)
        coded |= {p.unit.name: p.complete(below.coded[p.unit.name], shared) for p in items if p.same_base}
        return {
            p.unit.name: Choice(rate(c := coded[p.unit.name], shared), c.distortion, offset, name, p.setting)
            for p in items
        }  # fmt: skip

    def _cost(self, unit: str, point: Point) -> float:
        return self.kappa[unit] * point.distortion + self.slope * point.rate


def _servable(item: Prepared) -> bool:
    """Return whether the unit's metric is not all zero, so that overlays can work with it."""
    return bool(item.rows.any()) and bool((item.lower.diagonal() > 1e-12).all())


def _distortion(problem: UnitProblem, coded: Coded, shared: Shared) -> float:
    return problem.distortion(torch.from_numpy(decode_coded(coded, shared)))


def _front(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points that no other point dominates, by rising rate."""
    kept: list[Point] = []
    for p in sorted(points, key=lambda p: (p.rate, p.distortion)):
        if not kept or p.distortion < kept[-1].distortion:
            kept.append(p)
    return tuple(kept)


def solve(curves: Sequence[Curve], capacity: float, charges: Mapping[str, int]) -> Plan:
    """Return the plan of least distortion in which overlays that are used pay their fixed charges.

    Args:
        curves: of every unit; points of overlays are `Choice`s.
        capacity: bytes for all units and charges.
        charges: bytes that an overlay needs once for the whole file.

    >>> one = Curve("u", (Point(8, 9.0, 0), Point(12, 8.0, 1), Choice(9, 1.0, 0, "p", 1)))
    >>> [solve([one], 12, {"p": charge}).distortion for charge in (0, 3, 4)]
    [1.0, 1.0, 8.0]
    """
    charged = [n for n, b in charges.items() if b > 0]
    best: Plan | None = None
    for left_out in itertools.chain.from_iterable(
        itertools.combinations(charged, k) for k in range(len(charged) + 1)
    ):  # fmt: skip
        allowed = [Curve(c.name, _front(p for p in c.points if _path(p) not in left_out)) for c in curves]
        room = capacity - sum(charges[n] for n in charged if n not in left_out)
        if left_out != tuple(charged) and room < floor_rate(allowed):
            continue
        plan = allocate(allowed, max(room, floor_rate(allowed)))
        if best is None or plan.distortion < best.distortion:
            best = plan
    assert best is not None  # noqa: S101 (leaving all charged overlays out is always tried)
    return best


def _path(point: Point) -> str:
    return point.path if isinstance(point, Choice) else ""


def charges(taken: Iterable[str]) -> int:
    """Return the bytes that these overlays need once for the whole file."""
    return sum(overlays()[n].charge for n in taken)


def outcome(planner: Planner, with_paths: float, without: float) -> str:
    """Describe in one line how a plan over overlays compares with the best one without, in nats per token."""
    taken = sorted(Counter(p.path.id for p in planner.matrices if isinstance(p, OverlaidUnit)).items())
    words = ", ".join(f"{n} on {k}" for n, k in taken)
    better = with_paths < without
    return (
        f"overlays ({words} of {len(planner.matrices)} matrices) measured {abs(without - with_paths):.2g} nats "
        f"per token {'better' if better else 'worse'} than steps alone ({without:.4f}) at the same bytes: shipping "
        f"{'with' if better else 'without'} them"
    )


def chosen(plan: Plan) -> dict[str, int]:
    """Count the units under each overlay."""
    return dict(sorted(Counter(_path(p) for p in plan.choice.values() if _path(p)).items()))
