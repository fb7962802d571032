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

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from bytecap.allocation import correction, plans
from bytecap.allocation.asymmetric_targets import call_order
from bytecap.allocation.planner import Planner, State
from bytecap.allocation.plans import PlanCandidate
from bytecap.allocation.preparation import PreparedModel, prepare_model, prepare_streamed
from bytecap.calibration.statistics import moments
from bytecap.calibration.sums import Statistics
from bytecap.format.entropy.shared_tables import dump_shared
from bytecap.job import Job, Outcome
from bytecap.methods.floats import store_floats
from bytecap.methods.rate_control import Packed, fit_to_cap, fit_units
from bytecap.methods.retargeting import LAST, last_of, retarget, settle, size_beside
from bytecap.model.evaluation import kl_to
from bytecap.model.quantized_copy import copy_of, load_values, share_storage
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.model.texts import leading
from bytecap.progress import warn
from bytecap.quantization.options import Options, effort_on
from bytecap.quantization.quantizer import compile_ahead
from bytecap.recovery.checkpointing import StageCheckpoints
from bytecap.recovery.parameters import moves
from bytecap.recovery.streamed import tune_streamed
from bytecap.recovery.tuning import tune
from bytecap.system import allocator

_FINE_BITS = 6  # bits a weight from which grids may be too coarse to fill a budget


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
    return outcome if job.recover is None else recover(job, prepared, packed, outcome, quantized_copy, best.order)


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


def pack(job: Job, prepared: PreparedModel, best: PlanCandidate, state: State) -> Packed:
    """Meet the cap on real bytes, behind a walk for targets by rounding only its last matrices anew."""
    planner, tables, size = prepared.planner, dump_shared(state.shared), size_beside(job, prepared)
    allocator.release()
    if prepared.targets.get("kept"):
        with allocator.no_holes(), job.reporter.step("trimming to the cap", 1):
            found = fit_units(planner, state, tables, size, job.budget, last_of(best))
        if found is not None:
            return found
        if prepared.with_targets is not None:
            planner = prepared.with_targets()
    with allocator.no_holes(), job.reporter.step("trimming to the cap", 1):
        return fit_to_cap(planner, state, tables, size, job.budget)


def predict(
    job: Job, prepared: PreparedModel, best: PlanCandidate, packed: Packed, quantized_copy: nn.Module
) -> Outcome:
    """Return the outcome of a packed plan, with its KL on the correction tokens.

    Of a large model that is left to the evaluation of its file, which goes over these tokens too.
    """
    allocator.release()
    predicted = None
    if job.recover is not None or not prepared.large:
        with job.reporter.step("prediction", 1):
            predicted = _measured(job, prepared.planner, packed, quantized_copy)
    sections = {**packed.sections, **prepared.fixed}
    return Outcome(
        sections, packed.tables, predicted, best.slope, best.gap, best.label, margin=dict(best.margin),
        targets=dict(prepared.targets),
    )  # fmt: skip


def _measured(job: Job, planner: Planner, packed: Packed, quantized_copy: nn.Module) -> float:
    """Return the KL of a packed plan on the correction tokens; the copy shares the original's storage afterwards."""
    load_values(quantized_copy, correction.unit_values(planner, packed.state))
    found = kl_to(job.model.module, quantized_copy, job.sets.correction, device=job.device, ranks=job.ranks)[0]
    share_storage(quantized_copy, job.model.module)
    return found


def recover(
    job: Job, prepared: PreparedModel, packed: Packed, outcome: Outcome, quantized_copy: nn.Module,
    order: Sequence[Sequence[str]],
) -> Outcome:  # fmt: skip
    """Tune a packed plan and trim it to the same cap; returns the plan itself where that measures better.

    Args:
        job: tokens and effort.
        prepared: the units as they were packed.
        packed: their sections.
        outcome: of these.
        quantized_copy: a copy of the model that holds quantized values, overwritten.
        order: units that were given targets along a walk, stage by stage.
    """
    tuned, record = _tuned(job, prepared, packed, outcome.slope, quantized_copy, order)
    if tuned is not None:
        again, now = tuned
        if outcome.predicted is not None and now < outcome.predicted:
            job.reporter.note(f"recovery: KL on the correction tokens {outcome.predicted:.4f} before, {now:.4f} after")
            return replace(
                outcome, sections={**again.sections, **prepared.fixed}, tables=again.tables, predicted=now,
                before=(outcome.sections, outcome.tables), recovery=record,
            )  # fmt: skip
    job.reporter.note("recovery did not lower the KL on the correction tokens: stored as it was")
    return replace(outcome, recovery=record)


def _tuned(
    job: Job,
    prepared: PreparedModel,
    packed: Packed,
    slope: float,
    quantized_copy: nn.Module,
    order: Sequence[Sequence[str]],
) -> tuple[tuple[Packed, float] | None, dict[str, Any]]:
    """Return tuned sections under the cap with their KL, None if there are none, and a record of the tuning."""
    last = [p.unit.name for p in prepared.planner.matrices if moves(p)][: -LAST - 1 : -1]
    if isinstance(job.model, StreamedModel):
        found, record = tune_streamed(job, job.model, prepared.planner, packed.state, last)
    else:
        found, record = tune(job, prepared.planner, packed.state, quantized_copy, slope, order)
    if found is None:
        return None, record
    planner, state = found
    again = fit_units(
        planner, state, dump_shared(state.shared), size_beside(job, prepared), job.budget, last
    )  # fmt: skip
    return None if again is None else (again, _measured(job, planner, again, quantized_copy)), record
