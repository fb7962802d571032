"""`--method bytecap`: probe, prepare, search, correct, allocate, settle, trim.

The plan is made twice: once plain (one step for all units in the Fisher metric) and once allocated with measured
correction factors and rate-distortion points. Both are measured on the correction tokens at the same bytes, and
the better one is shipped. With a menu of exception paths (`bytecap.allocation.overlay_menu`) there is a third plan,
over base steps, paths and amounts, made around the allocated one and compared with both.

Drift targets come after the choice of paths: they aim the shipped plan's units, layers included, at the inputs that
its own coded prefix delivers. Aiming first would correct for errors of a prefix without paths, which is not shipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from bytecap.allocation import correction as correct
from bytecap.allocation import overlay_menu
from bytecap.allocation.allocate import allocate, floor_rate, refine
from bytecap.allocation.asymmetric_targets import LostError, drift_targets
from bytecap.allocation.budget_curve import margin
from bytecap.allocation.planner import Planner, State, VectorUnit
from bytecap.calibration import metric as sensitivity
from bytecap.calibration.probe import Statistics
from bytecap.calibration.residual_streams import streams_of
from bytecap.calibration.statistics import moments
from bytecap.errors import BudgetError
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.entropy.shared_tables import dump_shared
from bytecap.job import Job, Outcome, Section
from bytecap.methods.floats import fit_floats
from bytecap.methods.rate_control import Packed, fit_to_cap, fit_units
from bytecap.model.checkpoint import as_matrix
from bytecap.model.evaluation import kl_each, kl_to
from bytecap.model.quantized_copy import load_values, twin_of
from bytecap.model.texts import leading
from bytecap.quantization.quantizer import Options, Prepared, prepare
from bytecap.recovery.checkpointing import Kept, rules_from_json, rules_to_json
from bytecap.recovery.tuning import tune
from bytecap.system import allocator
from bytecap.types import Plan

_LADDER = (-1.0, -0.5, 0.5, 1.0)  # octaves of the step around the operating point
_FINE_BITS = 6  # bits a weight from which grids may be too coarse to fill a budget
_LAST = 6  # matrices coded last, which are rounded anew to meet the cap after recovery
_TABLES_GUESS = 700  # bytes of the tables section before it exists


@dataclass(frozen=True)
class _Work:
    """Prepared job: the planner, bytes it may use, and sections that are not planned."""

    planner: Planner
    fixed: dict[str, Section]


@dataclass(frozen=True)
class _Candidate:
    """A settled plan that could be shipped: every unit's step is `c` times its multiplier.

    Attributes:
        planner: holds the units, under their paths if it has any.
        slope, gap: of the plan it was made from.
        label, predicted, margin: once it is chosen, its name, its KL on the correction tokens, and what more or fewer
            bytes would do.
    """

    planner: Planner
    multipliers: Mapping[str, float]
    c: float
    state: State
    slope: float
    gap: float
    label: str = ""
    margin: dict[str, Any] = field(default_factory=dict)
    predicted: float = 0.0


def run(job: Job) -> Outcome:
    """Find the best sections under the cap."""
    options = Options(**job.options)
    work = _prepare(job, options, statistics(job, options))
    planner = work.planner
    capacity = _capacity(job, work, _TABLES_GUESS)
    if 8 * capacity > _FINE_BITS * planner.parameters and planner.finest_rate() < capacity:
        return _floats(job, work)
    twin = twin_of(job.model.module)
    kept = Kept(job, options, capacity)
    best = _kept_plan(planner, kept)
    if best is None:
        best = _choose(job, work, options, capacity, twin, kept)
    allocator.release()
    outcome = Outcome({}, b"", best.predicted, best.slope, best.gap, best.label, margin=best.margin)
    if job.dry_run:
        return outcome
    if options.drift:
        _apply_drift(job, best.planner, best.state, twin, kept)
    return _finish(job, work, best, capacity, outcome, twin)


def _choose(
    job: Job, work: _Work, options: Options, capacity: float, twin: nn.Module, kept: Kept
) -> _Candidate:  # fmt: skip
    """The best of all plans."""
    planner = work.planner
    ones = dict.fromkeys(planner.names, 1.0)
    c, plain = _plain(job, work, capacity)
    kappa = kept.get("factors") if options.correct else ones
    if kappa is None:
        kappa = _factors(job, planner, plain, twin)
        kept.put("factors", kappa)
    allocator.release()
    with allocator.no_holes(), job.reporter.step("allocation", 1):
        plan, multipliers, around = _allocate(planner, plain, kappa, capacity)
        found = {"plain": _Candidate(planner, ones, c, plain, plan.slope, plan.gap)}
        if options.allocate:
            c, state = planner.search(multipliers, capacity, start=c, rounds=4, tolerance=2e-3)
            found["allocated"] = _Candidate(planner, multipliers, c, state, plan.slope, plan.gap)
            del state
    del plain
    if job.paths:
        found |= _with_paths(job, found["allocated" if options.allocate else "plain"], kappa, capacity)
    with allocator.no_holes(), job.reporter.step("comparison with a plain plan", 1):
        label, predicted = _better(job, found, capacity, twin)
    best = replace(found[label], label=label, predicted=predicted, margin=around)
    if best.planner is planner:  # not one whose units are under exception paths
        _keep_plan(best, kept)
    return best


def _keep_plan(best: _Candidate, kept: Kept) -> None:
    """Put the chosen plan into the store: its numbers, and the rules its state was settled under."""
    assert best.state.rules is not None  # noqa: S101 (every settled state has them)
    kept.put("plan", {
        "label": best.label, "predicted": best.predicted, "slope": best.slope, "gap": best.gap, "c": best.c,
        "multipliers": dict(best.multipliers), "steps": best.state.steps, "rules": rules_to_json(best.state.rules),
        "last": rules_to_json((best.planner.shared, best.planner.shrink)), "margin": best.margin,
    })  # fmt: skip


def _kept_plan(planner: Planner, kept: Kept) -> _Candidate | None:
    """The chosen plan from the store, settled once more, and the planner as it was when it was chosen."""
    found = kept.get("plan")
    if found is None:
        return None
    planner.shared, planner.shrink = rules_from_json(found["rules"])
    state = planner.settle(found["steps"])
    planner.shared, planner.shrink = rules_from_json(found["last"])
    numbers = {k: found[k] for k in ("multipliers", "c", "slope", "gap", "label", "predicted", "margin")}
    return _Candidate(planner, state=state, **numbers)


def _with_paths(job: Job, start: _Candidate, kappa: Mapping[str, float], capacity: float) -> dict[str, _Candidate]:
    """The plan over exception paths, settled; nothing if no unit takes one."""
    streams = (
        streams_of(job.model.module, job.model.units, job.sets.statistics) if overlay_menu.CHANNELS in job.paths else ()
    )
    found = overlay_menu.Menu(start.planner, start.state, kappa, capacity, job.paths, streams)
    with job.reporter.step("exception paths", 1) as advance:
        found.measure(advance)
        for name, count in found.skipped.items():
            if count:
                job.reporter.note(f"path {name} cannot apply to {count} of {len(start.planner.matrices)} matrices")
        plan = found.solve()
        taken = overlay_menu.chosen(plan)
        if not taken:
            job.reporter.note("no exception path earns its bytes on any unit: steps alone are better")
            return {}
        planner, steps = found.planned(plan)
        del found
        c, state = planner.search(steps, capacity - overlay_menu.charges(taken), start=1.0, rounds=4, tolerance=2e-3)
    return {overlay_menu.LABEL: _Candidate(planner, steps, c, state, plan.slope, plan.gap)}


def planned(
    job: Job, options: Options, found: Statistics, known: Mapping[str, float] | None = None
) -> tuple[Planner, State, dict[str, float]]:
    """The allocated plan before drift targets, trimming and exception paths; uses up the statistics.

    Args:
        job: what to plan.
        options: ingredients.
        found: statistics of the job's tokens.
        known: steps of an earlier call with the same arguments; spares the search, and leaves the factors out.

    Returns:
        The planner, its state a little below the budget, and every unit's correction factor.
    """
    work = _prepare(job, options, found)
    planner = work.planner
    ones = dict.fromkeys(planner.names, 1.0)
    if known is not None:
        return planner, State(dict(known), {}, planner.shared, {}, {}), ones
    capacity = _capacity(job, work, _TABLES_GUESS)
    c, state = _plain(job, work, capacity)
    kappa = _factors(job, planner, state, twin_of(job.model.module)) if options.correct else ones
    with job.reporter.step("allocation", 1):
        _, multipliers, _ = _allocate(planner, state, kappa, capacity)
        _, state = planner.search(multipliers, capacity, start=c, rounds=4, tolerance=2e-3)
    return planner, state, kappa


def _floats(job: Job, work: _Work) -> Outcome:
    """Fill a budget that the finest grids leave unused."""
    units = [u for u in job.model.units if u.name not in work.fixed]
    work.planner.forget()
    with job.reporter.step("floats of fewer bits", 1):
        sections = fit_floats(
            units, lambda u: as_matrix(u, job.model.tensor(u).detach().float().cpu()).numpy(),
            lambda s: job.size({**s, **work.fixed}, b""), job.budget,
        )  # fmt: skip
    if sections is None:
        raise BudgetError(f"no plan fills {job.budget:,} bytes", job.budget)
    return Outcome({**sections, **work.fixed}, b"", 0.0, 0.0, 0.0, "floats")


def _plain(job: Job, work: _Work, capacity: float) -> tuple[float, State]:
    """The plan of one step for all units, and that step."""
    planner = work.planner
    with allocator.no_holes(), job.reporter.step("search", 1):
        ones = dict.fromkeys(planner.names, 1.0)
        c, state = planner.search(ones, capacity, start=planner.first_step(capacity), tolerance=2e-3)
        if state.rate > 1.02 * capacity:
            _raise_floor(job, work, state)
    allocator.release()
    return c, state


def _factors(job: Job, planner: Planner, state: State, twin: nn.Module) -> dict[str, float]:
    """Correction factor of every unit."""
    with job.reporter.step("correction factors", len(correct.roles(planner))) as advance:
        windows = leading(job.sets.correction, correct.TOKENS)
        found = correct.measure(planner, state, job.model.module, twin, windows, device=job.device, advance=advance)
    return dict.fromkeys(planner.names, 1.0) | correct.shrunk(found)


def _apply_drift(job: Job, planner: Planner, state: State, twin: nn.Module, kept: Kept) -> None:
    """Replace the planner's targets."""
    windows = leading(job.sets.statistics, planner.options.drift_tokens)
    change = kept.tensors("drift")
    with allocator.no_holes(), job.reporter.step("drift targets", 1) as advance:
        try:
            if change is None:
                change = drift_targets(
                    planner, state, job.model.module, twin, windows, strength=planner.options.drift,
                    device=job.device, advance=advance,
                )  # fmt: skip
                kept.put_tensors("drift", change)
        except LostError:
            job.reporter.note("the order in which modules are called depends on the data: no drift targets")
            return
        planner.matrices = [p.moved(change.pop(n)) if (n := p.unit.name) in change else p for p in planner.matrices]


def statistics(job: Job, options: Options) -> Statistics:
    """What one pass over the statistics tokens finds."""
    return moments(job, groups=options.groups, guided=options.guided)


def _prepare(job: Job, options: Options, found: Statistics) -> _Work:
    """Factors of the Hessians, vectors, and units that are stored exactly; uses up the statistics."""
    model = job.model
    matrices, vectors, fixed = [], [], {}
    buffers = dict(model.module.named_buffers(remove_duplicate=False))
    with allocator.no_holes(), job.reporter.step("factorisation", len(model.units)) as advance:
        for u in model.units:
            values = model.tensor(u).detach()
            if u.name in found.uses and min(u.matrix_shape) > 1:
                metric = sensitivity.join(found.uses.pop(u.name), found.tokens)
                matrices.append(prepare(u, as_matrix(u, values), metric, options))
            elif values.is_floating_point() and values.numel() and u.name not in buffers:
                vectors.append(VectorUnit(u, values.float().cpu().numpy(), sensitivity.diagonal(u, found)))
            else:
                fixed[u.name] = Section(EXACT.tag, EXACT.encode(as_matrix(u, values.cpu().numpy()), u.dtype))
            advance(1)
    _say_unused(job, [p.unit.name for p in matrices if not float(p.rows.sum())], vectors)
    found.uses.clear()
    allocator.release()
    return _Work(Planner(matrices, vectors, options), fixed)


def _say_unused(job: Job, matrices: list[str], vectors: list[VectorUnit]) -> None:
    """Name the units that calibration says nothing about: they get next to no bytes."""
    idle = matrices + [v.unit.name for v in vectors if not v.fisher.any()]
    if idle:
        job.reporter.note(f"warning: no gradient reaches {', '.join(idle)} on the calibration tokens: stored coarsely")


def _capacity(job: Job, work: _Work, tables: int) -> float:
    """Bytes left for planned units."""
    blank = {n: Section(1, b"") for n in work.planner.names} | work.fixed
    lengths = 2 * len(work.planner.names)  # longer lengths in the directory
    lanes = 2.2 * sum(p.unit.parameters for p in work.planner.matrices) / 8192  # a lane's state beyond its content
    return job.budget - job.size(blank, bytes(tables)) - lengths - lanes


def _raise_floor(job: Job, work: _Work, state: State) -> None:
    floor = math.ceil(state.rate + job.budget - _capacity(job, work, _TABLES_GUESS))
    top = ", ".join(f"{n} {state.rates[n]:.0f}" for n in sorted(state.rates, key=lambda n: -state.rates[n])[:3])
    raise BudgetError(
        f"a budget of {job.budget:,} bytes is below the smallest reachable size of about {floor:,}; "
        f"the largest units are {top}",
        floor,
    )


def _allocate(
    planner: Planner, plain: State, kappa: Mapping[str, float], capacity: float
) -> tuple[Plan, dict[str, float], dict[str, Any]]:
    """One slope over measured, corrected curves; returns the plan, each unit's step multiplier, and the margin."""
    curves = planner.ladder(plain.steps, plain, _LADDER)
    fine = [refine(c, kappa[c.name]) for c in curves]
    room = max(capacity, floor_rate(fine))
    plan = allocate(fine, room)
    return plan, {n: 2.0 ** plan.choice[n].setting for n in planner.names}, margin(fine, plan, room)


def _better(job: Job, found: Mapping[str, _Candidate], capacity: float, twin: nn.Module) -> tuple[str, float]:
    """Name of the candidate with the smallest KL on the correction tokens, and that KL.

    Candidates are compared at equal bytes: what one has spent beyond another is charged at the plan's slope.
    """
    values = {label: correct.unit_values(x.planner, x.state) for label, x in found.items()}
    measured = kl_each(job.model.module, twin, values, job.sets.correction, device=job.device)
    cost = {n: kl + found[n].slope * (found[n].state.rate - capacity) for n, (kl, _) in measured.items()}
    without = min((n for n in cost if n != overlay_menu.LABEL), key=cost.__getitem__)
    best = min(cost, key=cost.__getitem__)
    if overlay_menu.LABEL in found:
        job.reporter.note(
            overlay_menu.outcome(found[overlay_menu.LABEL].planner, cost[overlay_menu.LABEL], cost[without])
        )
    if best == "plain" and "allocated" in found:
        job.reporter.note("a plain plan measured better on the correction tokens at the same bytes: shipping that")
    return best, measured[best][0]


def _finish(
    job: Job, work: _Work, best: _Candidate, capacity: float, outcome: Outcome, twin: nn.Module
) -> Outcome:  # fmt: skip
    """Settle the chosen plan's tables, then meet the cap on real bytes."""
    planner = best.planner
    allocator.release()
    with allocator.no_holes(), job.reporter.step("trimming to the cap", 1):
        planner.shared = best.state.shared
        best.state.coded.clear()  # nobody looks at it any more
        _, state = planner.search(best.multipliers, capacity, start=best.c, rounds=3, tolerance=3e-4)
        tables = dump_shared(state.shared)
        # one more rounding with exactly the tables and offsets that will be written
        state = planner.settle(state.steps, refit=False)
        packed = fit_to_cap(planner, state, tables, lambda s, t: job.size({**s, **work.fixed}, t), job.budget)
    del state
    if job.recover is None:
        planner.forget()
    allocator.release()
    with job.reporter.step("prediction", 1):
        predicted = _measured(job, planner, packed, twin)
    if job.recover is not None:
        found, predicted, done = _recovered(job, work, best, packed, predicted, twin)
        before = None if found is packed else ({**packed.sections, **work.fixed}, packed.tables)
        outcome, packed = replace(outcome, before=before, recovery=done), found
    planner.forget()
    allocator.release()
    sections = {**packed.sections, **work.fixed}
    return replace(outcome, sections=sections, tables=packed.tables, predicted=predicted)


def _measured(job: Job, planner: Planner, packed: Packed, twin: nn.Module) -> float:
    """KL on the correction tokens."""
    load_values(twin, correct.unit_values(planner, packed.state))
    return kl_to(job.model.module, twin, job.sets.correction, device=job.device)[0]


def _recovered(
    job: Job, work: _Work, best: _Candidate, packed: Packed, kl: float, twin: nn.Module
) -> tuple[Packed, float, dict[str, Any]]:
    """What recovery made of a packed plan, trimmed to the same cap, its KL, and a record; the plan itself if better."""
    planner = best.planner
    state, done = tune(job, planner, packed.state, twin, best.slope)
    if state is not None:
        tables = dump_shared(state.shared)
        last = [p.unit.name for p in planner.matrices if type(p) is Prepared][: -_LAST - 1 : -1]
        tuned = fit_units(
            planner, state, tables, lambda s, t: job.size({**s, **work.fixed}, t), job.budget, last
        )  # fmt: skip
        now = math.inf if tuned is None else _measured(job, planner, tuned, twin)
        if tuned is not None and now < kl:
            job.reporter.note(f"recovery: KL on the correction tokens {kl:.4f} before, {now:.4f} after")
            return tuned, now, done
    job.reporter.note("recovery did not lower the KL on the correction tokens: stored as it was")
    return packed, kl, done
