"""`--method bytecap`: calibrate, prepare, plan, retarget, pack, recover.

1. *calibrate*: one pass over the statistics tokens says what an error in each weight costs.
2. *prepare*: Hessians are factored, and the bytes are counted that matrices and vectors may share.
3. *plan*: a step for every unit, the best of up to three plans (`bytecap.allocation.plans`).
4. *settle*: steps, tables and offsets are settled at the cap; those of a large model along the walk of 5.
5. *retarget*: units aim at the original's outputs from the inputs that the coded prefix delivers
   (`bytecap.allocation.asymmetric_targets`). This comes after all of that: aiming first would correct for errors of
   a prefix that is not shipped.
6. *pack*: the cap is met on real bytes (`bytecap.methods.rate_control`).
7. *recover*: what is stored is tuned end to end at equal bytes (`bytecap.recovery.tuning`), where that is asked for; of
   a streamed model with its integers as they are (`bytecap.recovery.streamed`).

Every stage takes values and returns values. A stage's input is dropped where its name is bound anew, which is what
bounds memory: factors and integers of the whole model are the most that a job holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from bytecap.allocation import correction, plans
from bytecap.allocation.asymmetric_targets import Walked, call_order, drift_targets
from bytecap.allocation.pacing import Pace
from bytecap.allocation.planner import Planner, State
from bytecap.allocation.plans import Costs, PlanCandidate
from bytecap.allocation.preparation import PreparedModel, prepare_model, prepare_streamed
from bytecap.allocation.shared_inputs import LostError
from bytecap.allocation.streamed_targets import all_moved, streamed_targets
from bytecap.calibration.statistics import moments
from bytecap.calibration.sums import Statistics
from bytecap.format.entropy.shared_tables import dump_shared
from bytecap.job import Job, Outcome, Section
from bytecap.methods.floats import store_floats
from bytecap.methods.rate_control import Packed, fit_to_cap, fit_units, near_cap
from bytecap.model.evaluation import by_window, kl_to
from bytecap.model.forward import rough_products
from bytecap.model.quantized_copy import copy_of, load_values, share_storage
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.model.texts import leading
from bytecap.model.uncertainty import ratio_stderr, surely_worse
from bytecap.progress import warn
from bytecap.quantization.options import Options, effort_on
from bytecap.quantization.quantizer import compile_ahead
from bytecap.recovery.checkpointing import StageCheckpoints
from bytecap.recovery.parameters import moves
from bytecap.recovery.streamed import tune_streamed
from bytecap.recovery.tuning import tune
from bytecap.system import allocator
from bytecap.system.scratch import KeptTensor

_FINE_BITS = 6  # bits a weight from which grids may be too coarse to fill a budget
_LAST = 6  # matrices coded last, which are rounded anew to meet the cap after recovery


def run(job: Job) -> Outcome:
    """Find the best sections under the cap."""
    options = Options.of(job.options, partial(warn, job.reporter), effort_on(job.device, job.config.effort))
    compile_ahead(options, job.device)
    if isinstance(job.model, StreamedModel):
        prepared = prepare_streamed(job, job.model, options)
    else:
        prepared = prepare(job, options, calibrate(job, options))
    if 8 * prepared.capacity > _FINE_BITS * prepared.planner.parameters:
        prepared, finest = prepared.measure_finest()
        if finest.rate < prepared.capacity:
            prepared = prepared.emptied()
            return store_floats(job, prepared)
    quantized_copy, checkpoints = copy_of(job.model.module), StageCheckpoints(job, options, prepared.capacity)
    prepared, best = plan(job, prepared, quantized_copy, checkpoints)
    if job.dry_run:
        return Outcome({}, b"", best.predicted, best.slope, best.gap, best.label, margin=dict(best.margin))
    # the settled state has no name here, which would keep its integers while new ones are made
    prepared, state = retarget(job, prepared, best, settle(job, prepared, best), quantized_copy, checkpoints)
    packed = pack(job, prepared, best, state)
    del state
    if job.recover is None:
        prepared = prepared.emptied()
    outcome = predict(job, prepared, best, packed, quantized_copy)
    return outcome if job.recover is None else recover(job, prepared, packed, outcome, quantized_copy)


def calibrate(job: Job, options: Options) -> Statistics:
    """Collect statistics in one pass over the statistics tokens."""
    return moments(job, guided=options.guided)


def prepare(job: Job, options: Options, found: Statistics) -> PreparedModel:
    """Factor the units and count the bytes they may use; uses up the statistics."""
    return prepare_model(job, options, found)


def plan(
    job: Job, prepared: PreparedModel, quantized_copy: nn.Module, checkpoints: StageCheckpoints
) -> tuple[PreparedModel, PlanCandidate]:
    """Choose the plan that is shipped; returns the units under their overlays, and the plan.

    Its integers that are made anew later are left out.

    Args:
        job: tokens to compare plans on, and overlays to choose from.
        prepared: the units.
        quantized_copy: a copy of the model that holds quantized values, overwritten.
        checkpoints: source and place of correction factors and plan.
    """
    known = checkpoints.get("plan")
    if known is None:
        best = _best_plan(job, prepared, quantized_copy, checkpoints)
    else:
        best = plans.from_json(prepared.planner, known)
    planner, order = best.planner, []
    if planner.options.drift and not job.dry_run:
        windows = leading(job.sets.statistics, planner.options.drift_tokens)
        order = call_order(planner, job.model.module, windows, job.device)
    prefix = set(planner.names).difference(*order) if order else ()  # of other units only steps are used again
    # the units go on in what is returned first: nobody else keeps their memory
    best = replace(best, planner=planner.emptied(), state=best.state.holding(prefix), order=order)
    allocator.release()
    return replace(prepared, planner=replace(planner, sample=None)), best


def _best_plan(
    job: Job, prepared: PreparedModel, quantized_copy: nn.Module, checkpoints: StageCheckpoints
) -> PlanCandidate:
    """Return the best of all plans, and keep it in the store if no unit is under an overlay."""
    planner = prepared.planner
    c, plain = plans.plain_plan(job, prepared)
    kappa = checkpoints.get("factors") if planner.options.correct else dict.fromkeys(planner.names, 1.0)
    if kappa is None:
        kappa = plans.factors(job, planner, plain, quantized_copy)
        checkpoints.put("factors", kappa)
    allocator.release()
    best = plans.choose(job, prepared, c, plain, kappa, quantized_copy)
    if best.planner is planner:  # not one whose units are under overlays
        checkpoints.put("plan", plans.to_json(best))
    return best


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
        return near_cap(planner, state, dump_shared(state.shared), _size_beside(job, prepared), job.budget).state


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
    walk = partial(_aimed, job, planner, best, state, paced, quantized_copy, checkpoints)
    some = job.recover is None and not checkpoints.active and not isinstance(job.model, StreamedModel)
    try:
        aimed, found = walk(_last_of(best) if some else None)
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
    """Return the bytes that a walk for targets is to meet, None where the plan is settled at the cap before.

    Settling takes five roundings of all units, which is worth its time on small models only.
    """
    plain = job.base is None and not job.paths and prepared.planner.options.drift
    return prepared.capacity if prepared.large and plain and best.order and len(best.costs[0]) else None


def _unaimed(job: Job, prepared: PreparedModel, best: PlanCandidate, state: State) -> State:
    """Return a settled state with all integers again, where units get no targets."""
    if _capacity(job, prepared, best) is not None:
        return settle(job, prepared, best, walks=False)
    return prepared.planner.settle(state.steps, state.rules, refit=False)


def _aimed(
    job: Job,
    planner: Planner,
    best: PlanCandidate,
    state: State,
    capacity: float | None,
    quantized_copy: nn.Module,
    checkpoints: StageCheckpoints,
    held: Collection[str] | None,
) -> tuple[Planner, State]:
    """Return the units with targets for the prefix that a state codes, all or those held, and the walk's integers.

    Raises:
        LostError: there are none.
    """
    windows, strength = leading(job.sets.statistics, planner.options.drift_tokens), planner.options.drift
    pace = Pace(planner, state, {n for names in best.order for n in names}, capacity)
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
                strength=strength, scratch=job.model.scratch, advance=advance,
            )  # fmt: skip
        else:
            found = drift_targets(
                planner, best.order, state, pace, job.model.module, quantized_copy, windows,
                strength=strength, device=job.device, advance=advance, held=held,
            )  # fmt: skip
            checkpoints.put_tensors("drift", found.change)
        coded = {**state.coded, **found.coded}
        return all_moved(planner, found.change), planner.settled(coded, pace.steps, state.rules)


def _last_of(best: PlanCandidate) -> list[str]:
    """Return the matrices that a walk codes last, from the end."""
    return [n for names in best.order for n in names][: -_LAST - 1 : -1]


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


def pack(job: Job, prepared: PreparedModel, best: PlanCandidate, state: State) -> Packed:
    """Meet the cap on real bytes, behind a walk for targets by rounding only its last matrices anew."""
    planner, tables, size = prepared.planner, dump_shared(state.shared), _size_beside(job, prepared)
    allocator.release()
    if prepared.targets.get("kept"):
        with allocator.no_holes(), job.reporter.step("trimming to the cap", 1):
            found = fit_units(planner, state, tables, size, job.budget, _last_of(best))
        if found is not None:
            return found
        if prepared.with_targets is not None:
            planner = prepared.with_targets()
    with allocator.no_holes(), job.reporter.step("trimming to the cap", 1):
        return fit_to_cap(planner, state, tables, size, job.budget)


def _size_beside(job: Job, prepared: PreparedModel) -> Callable[[Mapping[str, Section], bytes], int]:
    """Return a function that sizes the file of given sections and tables, fixed units included."""
    return lambda sections, tables: job.size({**sections, **prepared.fixed}, tables)


def predict(
    job: Job, prepared: PreparedModel, best: PlanCandidate, packed: Packed, quantized_copy: nn.Module
) -> Outcome:
    """Return the outcome of a packed plan, with its KL on the correction tokens."""
    allocator.release()
    with job.reporter.step("prediction", 1):
        predicted = _measured(job, prepared.planner, packed, quantized_copy)
    sections = {**packed.sections, **prepared.fixed}
    return Outcome(
        sections, packed.tables, predicted, best.slope, best.gap, best.label, margin=dict(best.margin),
        targets=dict(prepared.targets),
    )  # fmt: skip


def _measured(job: Job, planner: Planner, packed: Packed, quantized_copy: nn.Module) -> float:
    """Return the KL of a packed plan on the correction tokens."""
    load_values(quantized_copy, correction.unit_values(planner, packed.state))
    return kl_to(job.model.module, quantized_copy, job.sets.correction, device=job.device, ranks=job.ranks)[0]


def recover(job: Job, prepared: PreparedModel, packed: Packed, outcome: Outcome, quantized_copy: nn.Module) -> Outcome:
    """Tune a packed plan and trim it to the same cap; returns the plan itself where that measures better.

    Args:
        job: tokens and effort.
        prepared: the units as they were packed.
        packed: their sections.
        outcome: of these.
        quantized_copy: a copy of the model that holds quantized values, overwritten.
    """
    tuned, record = _tuned(job, prepared, packed, outcome.slope, quantized_copy)
    if tuned is not None:
        again, now = tuned
        if now < outcome.predicted:
            job.reporter.note(f"recovery: KL on the correction tokens {outcome.predicted:.4f} before, {now:.4f} after")
            return replace(
                outcome, sections={**again.sections, **prepared.fixed}, tables=again.tables, predicted=now,
                before=(outcome.sections, outcome.tables), recovery=record,
            )  # fmt: skip
    job.reporter.note("recovery did not lower the KL on the correction tokens: stored as it was")
    return replace(outcome, recovery=record)


def _tuned(
    job: Job, prepared: PreparedModel, packed: Packed, slope: float, quantized_copy: nn.Module
) -> tuple[tuple[Packed, float] | None, dict[str, Any]]:
    """Return tuned sections under the cap with their KL, None if there are none, and a record of the tuning."""
    last = [p.unit.name for p in prepared.planner.matrices if moves(p)][: -_LAST - 1 : -1]
    if isinstance(job.model, StreamedModel):
        found, record = tune_streamed(job, job.model, prepared.planner, packed.state, last)
    else:
        found, record = tune(job, prepared.planner, packed.state, quantized_copy, slope)
    if found is None:
        return None, record
    planner, state = found
    again = fit_units(
        planner, state, dump_shared(state.shared), _size_beside(job, prepared), job.budget, last
    )  # fmt: skip
    return None if again is None else (again, _measured(job, planner, again, quantized_copy)), record
