"""Settle a plan at the cap, and give units targets that follow the coded prefix.

A small model is settled first: steps, tables and offsets are those that the walk for targets then codes with. That
takes five roundings of all units and two codings of all sections. A large model is rounded as rarely as can be. Its
walk goes on from the plan as it was measured, a percent or two off the cap, moves steps as it goes
(`bytecap.allocation.pacing`), and has its sections coded meanwhile (`bytecap.allocation.packing`). It is settled only
where its targets do not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from bytecap.allocation import correction
from bytecap.allocation.asymmetric_targets import Walked, drift_targets
from bytecap.allocation.pacing import Pace
from bytecap.allocation.packing import Packing
from bytecap.allocation.planner import Planner, State
from bytecap.allocation.plans import Costs, PlanCandidate
from bytecap.allocation.preparation import PreparedModel
from bytecap.allocation.shared_inputs import LostError
from bytecap.allocation.streamed_targets import all_moved, streamed_targets
from bytecap.format.entropy.shared_tables import dump_shared
from bytecap.job import Job, Section
from bytecap.methods.rate_control import near_cap
from bytecap.model.evaluation import by_window
from bytecap.model.forward import rough_products
from bytecap.model.quantized_copy import load_values, share_storage
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.model.texts import leading
from bytecap.model.uncertainty import ratio_stderr, surely_worse
from bytecap.recovery.checkpointing import StageCheckpoints
from bytecap.system import allocator
from bytecap.system.scratch import KeptTensor

LAST = 6  # matrices coded last, which are rounded anew to meet the cap


def settle(job: Job, prepared: PreparedModel, best: PlanCandidate, *, walks: bool = True) -> State:
    """Settle the chosen plan at the cap, with the tables and offsets that will be written.

    The plan of a large model stays as it is, a little off the cap, where a walk meets it (`_capacity`).

    Args:
        job: the cap.
        prepared: the units.
        best: the plan.
        walks: whether a walk for targets follows.
    """
    planner = prepared.planner
    if walks and _capacity(job, prepared, best) is not None:
        return best.at_offsets()
    allocator.release()
    with allocator.no_holes(), job.reporter.step("settling at the cap", 1):
        _, state = planner.search(
            best.multipliers, prepared.capacity, best.state.rules, start=best.c, rounds=3, tolerance=3e-4, exact=True
        )  # fmt: skip
        # one more rounding with exactly the tables and offsets that will be written
        state = planner.settle(state.steps, state.rules, refit=False)
        return near_cap(planner, state, dump_shared(state.shared), size_beside(job, prepared), job.budget).state


def retarget(
    job: Job,
    prepared: PreparedModel,
    best: PlanCandidate,
    state: State,
    quantized_copy: nn.Module,
    checkpoints: StageCheckpoints,
) -> tuple[PreparedModel, State]:
    """Give units targets that make up for the coded prefix, unless that surely raises the KL on the correction tokens.

    A target corrects for the very errors of the units before it, not only for errors like them: rounded again at other
    steps or tables, the prefix has other errors and most of the gain is lost. So steps and tables are settled first,
    and what is coded along the walk is what is stored. Units stay as they are where the order of calls is not fixed.

    Targets were made and given their strengths on other tokens, while the plan without them was chosen and corrected
    on the very tokens that decide: so they go only where they cost more by two paired standard errors.

    Args:
        job: tokens to walk, and others to decide by.
        prepared: the units.
        best: the plan.
        state: the plan settled at the cap, which codes the prefix.
        quantized_copy: a copy of the model that holds quantized values, overwritten.
        checkpoints: source and place of targets.

    Returns:
        The units with their targets, and their state.
    """
    planner = prepared.planner
    if not planner.options.drift:
        return prepared, state
    paced = _capacity(job, prepared, best)
    targets, without = checkpoints.get("targets"), None
    if targets is None and paced is not None:
        without = best.costs
    elif targets is None:  # measured before targets take memory
        with allocator.no_holes(), job.reporter.step("comparison of targets", 1):
            without = _cost(job, planner, state, best.slope, quantized_copy)
        allocator.release()
    staged = {n for names in best.order for n in names}
    state = state.holding(set(planner.names) - staged)
    walk = partial(_walked, job, planner, best, state, paced, quantized_copy, checkpoints)
    some = job.recover is None and (isinstance(job.model, StreamedModel) or not checkpoints.active)
    try:
        aimed, found = walk(last_of(best) if some else None)
    except LostError:
        job.reporter.note("the order in which modules are called depends on the data: no drift targets")
        return prepared, _unaimed(job, prepared, best, state)
    allocator.release()
    if without is not None:
        with allocator.no_holes(), job.reporter.step("comparison of targets", 1):
            with_them = _cost(job, aimed, found, best.slope, quantized_copy)
        targets = _judged(without, with_them)
        checkpoints.put("targets", targets)
    if targets["kept"]:
        again = (lambda: walk(None)[0]) if some else None
        return replace(prepared, planner=aimed, targets=targets, with_targets=again), found
    job.reporter.note("targets that follow the coded prefix raise the KL on the correction tokens: left out")
    del found
    return replace(prepared, targets=targets), _unaimed(job, prepared, best, state)


def _capacity(job: Job, prepared: PreparedModel, best: PlanCandidate) -> float | None:
    """Return the bytes that a walk for targets is to meet, None where the plan is settled at the cap before."""
    plain = job.base is None and not job.paths and prepared.planner.options.drift
    return prepared.capacity if prepared.large and plain and best.order and len(best.costs[0]) else None


def _unaimed(job: Job, prepared: PreparedModel, best: PlanCandidate, state: State) -> State:
    """Return a settled state with all integers again, where units get no targets."""
    if _capacity(job, prepared, best) is not None:
        return settle(job, prepared, best, walks=False)
    return prepared.planner.settle(state.steps, state.rules, refit=False)


def _walked(
    job: Job,
    planner: Planner,
    best: PlanCandidate,
    state: State,
    capacity: float | None,
    quantized_copy: nn.Module,
    checkpoints: StageCheckpoints,
    held: Collection[str] | None,
) -> tuple[Planner, State]:
    """Return what `_aimed` does, with the sections where the walk is to meet a capacity and one process makes it."""
    staged = {n for names in best.order for n in names}
    if capacity is None or job.ranks.size > 1:
        pace = Pace(planner, state, staged, capacity)
        return _aimed(job, planner, best, state, pace, quantized_copy, checkpoints, held)
    with Packing(planner, state, staged) as packing:
        pace = Pace(planner, state, staged, capacity, packing.add)
        aimed, found = _aimed(job, planner, best, state, pace, quantized_copy, checkpoints, held)
        return aimed, replace(found, sections=packing.sections())


def _aimed(
    job: Job,
    planner: Planner,
    best: PlanCandidate,
    state: State,
    pace: Pace,
    quantized_copy: nn.Module,
    checkpoints: StageCheckpoints,
    held: Collection[str] | None,
) -> tuple[Planner, State]:
    """Return the units with targets for the prefix that a state codes, all or those held, and the walk's integers.

    Raises:
        LostError: there are none.
    """
    windows, strength = leading(job.sets.statistics, planner.options.drift_tokens), planner.options.drift
    change = None if isinstance(job.model, StreamedModel) else checkpoints.tensors("drift")
    with allocator.no_holes(), job.reporter.step("drift targets", 1) as advance:
        if change is not None:
            aimed = all_moved(planner, change)
            units, coded = {p.unit.name: p for p in aimed.matrices}, dict(state.coded)
            for names in best.order:  # as the walk did: on a GPU integers depend on what is rounded together
                coded |= pace.round(aimed, [units[n] for n in names])
            return aimed, aimed.settled(coded, pace.steps, state.rules)
        found: Walked[KeptTensor] | Walked[Tensor]
        if isinstance(job.model, StreamedModel):
            streamed = job.model.streamed
            found = streamed_targets(
                planner, best.order, state, pace, streamed, streamed.copy(), windows,
                strength=strength, scratch=job.model.scratch, advance=advance, held=held,
            )  # fmt: skip
        else:
            found = drift_targets(
                planner, best.order, state, pace, job.model.module, quantized_copy, windows,
                strength=strength, device=job.device, advance=advance, held=held,
            )  # fmt: skip
            checkpoints.put_tensors("drift", found.change)
        coded = {**state.coded, **found.coded}
        return all_moved(planner, found.change), planner.settled(coded, pace.steps, state.rules)


def last_of(best: PlanCandidate) -> list[str]:
    """Return the matrices that a walk codes last, from the end."""
    return [n for names in best.order for n in names][: -LAST - 1 : -1]


def _judged(without: Costs, with_them: Costs) -> dict[str, Any]:
    """Return whether targets are kept, and what the correction tokens say about them, in nats per token."""
    (before, tokens), (after, _) = without, with_them
    return {
        "kept": not surely_worse(before, after, tokens),
        "cost_with": float(after.sum() / tokens.sum()),
        "cost_without": float(before.sum() / tokens.sum()),
        "change_stderr": ratio_stderr(after - before, tokens) if len(tokens) > 1 else 0.0,
    }


def _cost(job: Job, planner: Planner, state: State, slope: float, quantized_copy: nn.Module) -> Costs:
    """Return the KL of a plan's units on the windows for correction, plus their bytes at the plan's slope; and tokens.

    The copy shares the original's storage afterwards: loaded values would take a model's memory until the next stage.
    """
    load_values(quantized_copy, correction.unit_values(planner, state))
    with rough_products(job.device, wanted=correction.is_rough(planner, state)):
        found = by_window(
            job.model.module, quantized_copy, {"": {}}, job.sets.correction, device=job.device, ranks=job.ranks
        )[""]
    share_storage(quantized_copy, job.model.module)
    return found.kl + slope * state.rate * found.tokens, found.tokens


def size_beside(job: Job, prepared: PreparedModel) -> Callable[[Mapping[str, Section], bytes], int]:
    """Return a function that sizes the file of given sections and tables, fixed units included."""
    return lambda sections, tables: job.size({**sections, **prepared.fixed}, tables)
