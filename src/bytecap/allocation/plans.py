"""Make the plans of a job at one capacity and choose the one that is shipped.

The plan is made twice: once plain (one step for all units in the Fisher metric) and once allocated with measured
correction factors and rate-distortion points. With a menu of overlays (`bytecap.allocation.overlay_menu`) there
is a third one, over base steps, overlays and amounts, made around the allocated one. All are measured on the correction
tokens, and what one spends beyond another is charged at the plan's slope, so they are compared at equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from bytecap.allocation import correction, overlay_menu
from bytecap.allocation.allocate import allocate, floor_rate, refine
from bytecap.allocation.budget_curve import margin
from bytecap.allocation.planner import Planner, State
from bytecap.allocation.preparation import PreparedModel
from bytecap.allocation.unused import advice
from bytecap.calibration.residual_streams import streams_of
from bytecap.errors import BudgetError
from bytecap.job import Job
from bytecap.model.evaluation import by_window
from bytecap.model.forward import rough_products
from bytecap.model.quantized_copy import copy_of
from bytecap.model.texts import leading
from bytecap.quantization.rules import Rules, rules_from_json, rules_to_json
from bytecap.system import allocator
from bytecap.types import Plan

Costs = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Cost of every window in nats, summed over its tokens; and its tokens."""

_WIDENING = 24  # times that the step of an update's differences is doubled where no search has made them small enough
_LADDER = (-1.0, -0.5, 0.5, 1.0)  # octaves of the step around the operating point


@dataclass(frozen=True)
class PlanCandidate:
    """A settled plan that could be shipped: every unit's step is `c` times its multiplier.

    Attributes:
        planner: holds the units, under their overlays if it has any; emptied once it is chosen.
        slope, gap: of the plan it was made from, in nats per byte and nats per token.
        label, predicted, margin: once it is chosen, its name, its KL on the correction tokens, and what more or fewer
            bytes would do.
        order: units that get targets, stage by stage; the state does not hold their integers.
        costs: once it is chosen, its KL on the windows for correction with its bytes at the slope; empty if unknown.
    """

    planner: Planner
    multipliers: Mapping[str, float]
    c: float
    state: State
    slope: float
    gap: float
    label: str = ""
    margin: Mapping[str, Any] = field(default_factory=dict)
    predicted: float = 0.0
    order: Sequence[Sequence[str]] = ()
    costs: Costs = field(default_factory=lambda: (np.zeros(0), np.zeros(0)))

    def at_offsets(self) -> State:
        """Return the state, for rounding to go on with the offsets that its integers are decoded with."""
        rules, shrinking = self.state.rules, self.planner.options.shrink
        return replace(self.state, rules=rules.with_offsets(rules.shared.offset)) if shrinking else self.state


def plain_plan(job: Job, prepared: PreparedModel) -> tuple[float, State]:
    """Return the common step of the plan with one step for all units, and the plan.

    Raises:
        BudgetError: no step is wide enough.
    """
    planner, capacity = prepared.planner, prepared.capacity
    with allocator.no_holes(), job.reporter.step("search", 1):
        ones = dict.fromkeys(planner.names, 1.0)
        start = planner.first_step(capacity)
        c, state = planner.search(ones, capacity, prepared.rules, start=start, tolerance=2e-3)
        for _ in range(_WIDENING if job.base is not None else 0):  # nothing is left of any difference in the end
            if state.rate <= 1.02 * capacity:
                break
            c *= 2
            state = planner.settle(dict.fromkeys(planner.names, c), state.rules)
        if state.rate > 1.02 * capacity:
            _raise_floor(job, prepared, state)
    allocator.release()
    return c, state


def _raise_floor(job: Job, prepared: PreparedModel, state: State) -> None:
    floor = math.ceil(state.rate + job.budget - prepared.capacity)
    sizes = dict(state.rates) | {n: section.length for n, section in prepared.fixed.items()}
    top = ", ".join(f"{n} {sizes[n]:.0f}" for n in sorted(sizes, key=lambda n: -sizes[n])[:3])
    raise BudgetError(
        f"a budget of {job.budget:,} bytes is below the smallest reachable size of about {floor:,}; "
        f"the largest units are {top}{advice(prepared.unused)}",
        floor,
    )


def factors(job: Job, planner: Planner, state: State, quantized_copy: nn.Module) -> dict[str, float]:
    """Measure the correction factor of every unit."""
    with job.reporter.step("correction factors", len(correction.roles(planner))) as advance:
        windows = leading(job.sets.correction, correction.TOKENS)
        found = correction.measure(
            planner, state, job.model.module, quantized_copy, windows, device=job.device, advance=advance,
            ranks=job.ranks,
        )  # fmt: skip
    return dict.fromkeys(planner.names, 1.0) | correction.shrunk(found)


def step_multipliers(
    planner: Planner, plain: State, kappa: Mapping[str, float], capacity: float
) -> tuple[Plan, dict[str, float], dict[str, Any]]:
    """Allocate bytes at one slope over measured, corrected curves; returns plan, step multipliers and margin."""
    curves = planner.ladder(plain, _LADDER)
    fine = [refine(c, kappa[c.name]) for c in curves]
    room = max(capacity, floor_rate(fine))
    plan = allocate(fine, room)
    return plan, {n: 2.0 ** plan.choice[n].setting for n in planner.names}, margin(fine, plan, room)


def choose(
    job: Job, prepared: PreparedModel, c: float, plain: State, kappa: Mapping[str, float], quantized_copy: nn.Module
) -> PlanCandidate:
    """Return the plan with the lowest KL on the correction tokens, at equal bytes.

    Args:
        job: names the overlays, and the tokens to compare on.
        prepared: the units.
        c: step of the plain plan.
        plain: its state.
        kappa: correction factor of every unit.
        quantized_copy: a copy of the model that holds quantized values, overwritten.
    """
    planner, capacity = prepared.planner, prepared.capacity
    with allocator.no_holes(), job.reporter.step("allocation", 1):
        plan, multipliers, around = step_multipliers(planner, plain, kappa, capacity)
        ones = dict.fromkeys(planner.names, 1.0)
        found = {"plain": PlanCandidate(planner, ones, c, plain, plan.slope, plan.gap)}
        if planner.options.allocate:
            c, state = planner.search(multipliers, capacity, plain.rules, start=c, rounds=4, tolerance=2e-3)
            # whichever is chosen: rounding goes on with the offsets found last
            plain = replace(plain, rules=Rules(plain.shared, state.rules.shrink))
            found = {
                "plain": replace(found["plain"], state=plain),
                "allocated": PlanCandidate(planner, multipliers, c, state, plan.slope, plan.gap),
            }
            del state
    del plain
    if job.paths:
        start = found["allocated" if planner.options.allocate else "plain"]
        found |= _with_overlays(job, start, kappa, capacity)
    with allocator.no_holes(), job.reporter.step("comparison with a plain plan", 1):
        label, costs = best_of(job, found, capacity, quantized_copy)
    chosen, (nats, tokens) = found[label], costs
    predicted = float(nats.sum() / tokens.sum())
    costs = nats + chosen.slope * chosen.state.rate * tokens, tokens
    return replace(chosen, label=label, predicted=predicted, margin=around, costs=costs)


def _with_overlays(
    job: Job, start: PlanCandidate, kappa: Mapping[str, float], capacity: float
) -> dict[str, PlanCandidate]:
    """Return the settled plan over overlays by its label; empty if no unit takes one."""
    streams = (
        streams_of(job.model.module, job.model.units, job.sets.statistics) if overlay_menu.CHANNELS in job.paths else ()
    )
    found = overlay_menu.Menu(start.planner, start.state, kappa, capacity, job.paths, streams)
    with job.reporter.step("overlays", 1) as advance:
        found.measure(advance)
        for name, count in found.skipped.items():
            if count:
                job.reporter.note(f"overlay {name} cannot apply to {count} of {len(start.planner.matrices)} matrices")
        plan = found.solve()
        taken = overlay_menu.chosen(plan)
        if not taken:
            job.reporter.note("no overlay earns its bytes on any unit: steps alone are better")
            return {}
        planner, steps = found.planned(plan)
        del found
        room = capacity - overlay_menu.charges(taken)
        c, state = planner.search(steps, room, start.state.rules, start=1.0, rounds=4, tolerance=2e-3)
    return {overlay_menu.LABEL: PlanCandidate(planner, steps, c, state, plan.slope, plan.gap)}


def best_of(
    job: Job, found: Mapping[str, PlanCandidate], capacity: float, quantized_copy: nn.Module
) -> tuple[str, Costs]:
    """Return the name of the candidate with the smallest KL on the correction tokens, and that KL by window.

    Candidates are compared at equal bytes: what one has spent beyond another is charged at the plan's slope.
    """
    values = {label: correction.unit_values(x.planner, x.state) for label, x in found.items()}
    rough = all(correction.is_rough(x.planner, x.state) for x in found.values())
    with rough_products(job.device, wanted=rough):
        measured = by_window(
            job.model.module, quantized_copy, values, job.sets.correction, device=job.device, ranks=job.ranks
        )
    cost = {
        n: float(x.kl.sum() / x.tokens.sum()) + found[n].slope * (found[n].state.rate - capacity)
        for n, x in measured.items()
    }
    without = min((n for n in cost if n != overlay_menu.LABEL), key=cost.__getitem__)
    best = min(cost, key=cost.__getitem__)
    if overlay_menu.LABEL in found:
        job.reporter.note(
            overlay_menu.outcome(found[overlay_menu.LABEL].planner, cost[overlay_menu.LABEL], cost[without])
        )
    if best == "plain" and "allocated" in found:
        job.reporter.note("a plain plan measured better on the correction tokens at the same bytes: shipping that")
    return best, (measured[best].kl, measured[best].tokens)


def to_json(best: PlanCandidate) -> dict[str, Any]:
    """Return a chosen plan as JSON can hold it: its numbers, and the rules that its state was settled under."""
    assert best.state.origin is not None  # noqa: S101 (every settled state has them)
    return {
        "label": best.label, "predicted": best.predicted, "slope": best.slope, "gap": best.gap, "c": best.c,
        "multipliers": dict(best.multipliers), "steps": dict(best.state.steps),
        "rules": rules_to_json(best.state.origin), "last": rules_to_json(best.state.rules), "margin": best.margin,
        "costs": [x.tolist() for x in best.costs],
    }  # fmt: skip


def from_json(planner: Planner, kept: Mapping[str, Any]) -> PlanCandidate:
    """Read the plan that `to_json` wrote, and settle it once more."""
    state = planner.settle(kept["steps"], rules_from_json(kept["rules"]))
    state = replace(state, rules=Rules(state.shared, rules_from_json(kept["last"]).shrink))
    numbers = {k: kept[k] for k in ("multipliers", "c", "slope", "gap", "label", "predicted", "margin")}
    costs, tokens = map(np.array, kept["costs"])
    return PlanCandidate(planner, state=state, costs=(costs, tokens), **numbers)


def allocated_plan(
    job: Job, prepared: PreparedModel, known: Mapping[str, float] | None = None
) -> tuple[State, dict[str, float]]:
    """Return the allocated plan, without drift targets, trimming and overlays.

    Args:
        job: what to plan.
        prepared: its units.
        known: steps of an earlier call with the same arguments; spares the search, and leaves the factors out.

    Returns:
        Its state, a little below the budget, and every unit's correction factor.
    """
    planner, capacity = prepared.planner, prepared.capacity
    ones = dict.fromkeys(planner.names, 1.0)
    if known is not None:
        return State(dict(known), {}, prepared.rules, {}, {}), ones
    c, state = plain_plan(job, prepared)
    kappa = factors(job, planner, state, copy_of(job.model.module)) if planner.options.correct else ones
    with job.reporter.step("allocation", 1):
        _, multipliers, _ = step_multipliers(planner, state, kappa, capacity)
        _, state = planner.search(multipliers, capacity, state.rules, start=c, rounds=4, tolerance=2e-3)
    return state, kappa
