"""Tune stored values after coding, end to end, so that the coded model comes closer to the original.

Rounding minimises one unit's quadratic form at a time. What is left are the errors of all units together, and those
one backward pass sees: the gradient of the KL to the original at the coded weights. Adam follows it in two stages
(`bytecap.recovery.parameters` holds the tuned tensors):

1. *integers*: the matrices are coded anew, some at a time and in the order of the model, with error feedback as
   before. In between the targets of all that is not coded yet are tuned, so that later matrices make up for what
   earlier ones have done to the whole model. The price of an integer under the file's tables is part of the loss, and
   the steps of the rest are steered so that the bytes stay those of the plan.
2. *values*: codes are frozen; vectors (norms, biases), the step of every matrix and the reconstruction offsets of the
   classes are tuned. The file keeps its integers and its size. In the first stage they are tuned too.

Each stage is kept only if it measures better on the correction tokens, which are never tuned on, and the second goes
back to the best that was seen. What is shipped is trimmed to the cap on real bytes, measured once more, and is better
than the file without recovery, or is that file: recovery never makes it worse there, and the file never grows.

Sources: QuIP# (arXiv:2402.04396) for tuning what is not quantized yet, block after block, then what quantization leaves
continuous; ClusComp (ACL 2025) and OWQ (arXiv:2306.02272) for the latter alone. Tried and worse: moving integers
straight through their rounding (LOG.md).
Omitted: units under an overlay keep their integers; overlays are tuned in `bytecap.recovery.sections`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.allocation import correction
from bytecap.allocation.asymmetric_targets import tokens_of
from bytecap.allocation.planner import Planner, State
from bytecap.calibration.statistics import job_key, windows_key
from bytecap.job import Job
from bytecap.model.batches import is_batches
from bytecap.model.quantized_copy import load_values
from bytecap.recovery import loop
from bytecap.recovery.checkpointing import ProgressCheckpoint
from bytecap.recovery.coding_pace import CodingPace
from bytecap.recovery.group_walk import GroupWalk, TunedUnits
from bytecap.recovery.kl_passes import Passes, same_again, tokens_of_iteration
from bytecap.recovery.loop import Clock, Schedule
from bytecap.recovery.parameters import TunedParameters
from bytecap.system import allocator

RATE = 0.004  # learning rate of targets, in steps of each weight's grid
VALUES_RATE = 0.002  # of everything else: in natural logarithms, in steps, in mean sizes
_LAST = 0.15  # share of the effort that is left for values alone
_GROUPS = 24  # times that matrices are coded
_TRIES = 3  # more at the last of them
_BELOW = 4e-4  # share of the bytes that is left for trimming
_MOST_STEERING = 0.1  # natural logarithms of a step
_SCHEDULE = Schedule(warming=10, checks=12, apart=5)


class _TuningRun:
    """The iterations of one job."""

    def __init__(
        self, job: Job, planner: Planner, state: State, quantized_copy: nn.Module, slope: float,
        order: Sequence[Sequence[str]],
    ) -> None:  # fmt: skip
        self.job, self.quantized_copy = job, quantized_copy
        self.parameters = TunedParameters(planner, state, job.device)
        self.passes, self.nats_per_bit = Passes(job, quantized_copy), slope / 8
        windows, options = job.sets.statistics, planner.options
        self._walk = GroupWalk(
            job, order, strength=options.drift, tokens=tokens_of(planner, job.device, windows),
            most=options.drift_tokens,
        ) if order else None  # fmt: skip
        effort = [job.recover.steps, job.recover.seconds] if job.recover else []
        self._checkpoint = ProgressCheckpoint(job.store) if job.store.directory is None else ProgressCheckpoint(
            job.store, job_key(job), windows_key(job.sets.recovery or job.sets.statistics), job.budget, effort, RATE,
            VALUES_RATE, job.base.sha256 if job.base else "", asdict(planner.options), state.steps, "recovery",
        )  # fmt: skip
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # also those that are not tuned
            values = correction.unit_values(planner, state)
            load_values(quantized_copy, dict(zip(values, pool.map(values.__getitem__, values), strict=True)))

    def optimizer(self) -> torch.optim.Adam:
        """Return Adam over all tensors that are tuned now."""
        return loop.adam((t, self._rate(name)) for name, t in self.tuned().items())

    def _rate(self, name: str) -> float:
        """Return the first rate of a tensor."""
        if name.startswith("vector "):
            return VALUES_RATE * self.parameters.vector_size(name[7:])
        return RATE if name.startswith("target ") else VALUES_RATE

    def tuned(self) -> dict[str, Tensor]:
        """Return the tensors that are tuned now."""
        return {**self.parameters.values_only(), **self.parameters.targets()}

    def iterate(self, optimizer: torch.optim.Adam, rate: float) -> float:
        """Make one iteration at a share of the first rates; returns the mean KL before it, and moves nothing by NaN."""
        self.passes.load(self.parameters.values())
        kl, found = self.passes.gradients(self.parameters.names)
        if not math.isfinite(kl):
            return kl
        tensors = self.tuned()
        for name, g in self.parameters.gradients(found, self.nats_per_bit).items():
            tensors[name].grad = g
        loop.set_rates(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad()
        return kl

    def code(self, names: list[str], change: float) -> float:
        """Code a group, see `TunedParameters.code`."""
        return self.parameters.code(names, change, None if self._walk is None else partial(self._walked, self._walk))

    def _walked(self, walk: GroupWalk, names: Sequence[str], units: TunedUnits) -> None:
        """Code a group along a walk, from the present values of all units."""
        self.passes.load(self.parameters.values())
        walk.code(self.quantized_copy, names, units)

    def keep(self, optimizer: torch.optim.Adam, clock: Clock, parts: int, beyond: float) -> None:
        """Keep the progress in the store, after some parts were coded and the rest was tuned."""

        def state() -> tuple[dict[str, Tensor], Any]:
            found = {f"live {n}": t for n, t in self.parameters.state().items()}
            for name, t in self.tuned().items():
                found |= {f"adam {k} {name}": v for k, v in optimizer.state[t].items()}
            return found, [parts, clock.iterations, clock.seconds, beyond]

        self._checkpoint.put(state)

    def resume(self, optimizer: torch.optim.Adam, clock: Clock, beyond: float) -> tuple[int, float]:
        """Return the parts that are coded and the bytes beyond the plan, from the store; else 0 and `beyond`."""
        found = self._checkpoint.get()
        if found is None:
            return 0, beyond
        kept, (parts, iterations, seconds, beyond) = found
        device = torch.device(self.job.device)
        self.parameters.resume({n[5:]: t.to(device) for n, t in kept.items() if n.startswith("live ")})
        self.passes.skip(iterations, seconds)
        clock.resume(iterations, seconds)
        for name, t in self.tuned().items():
            mine = {k: kept[m] for k in ("step", "exp_avg", "exp_avg_sq") if (m := f"adam {k} {name}") in kept}
            if not mine:  # no iteration was sound until then
                continue
            optimizer.state[t] = {k: v if k == "step" else v.to(device) for k, v in mine.items()}
        return parts, beyond

    def check(self) -> float:
        """Return the KL on the correction tokens."""
        self.passes.load(self.parameters.values())
        return self.passes.check()


def _integers(tuning_run: _TuningRun, clock: Clock, kl: float) -> dict[str, Any]:
    """Code everything anew, group after group, and tune the rest in between."""
    parameters = tuning_run.parameters
    parameters.unfreeze(dict(tuning_run.job.model.module.state_dict()))
    optimizer = tuning_run.optimizer()
    total = parameters.planned(parameters.matrices)[0]
    beyond, now = _BELOW * total, kl
    seen: list[tuple[float, int, float]] = []
    first, beyond = tuning_run.resume(optimizer, clock, beyond)
    pace = CodingPace(clock, parameters.groups(clock.parts(_GROUPS)), first)
    for group in pace:
        waiting = parameters.planned([*group, *pace.left])[1]
        change = max(-_MOST_STEERING, min(_MOST_STEERING, beyond / (waiting / 8 * 1.2)))
        spent = tuning_run.code(group, change)
        for _ in range(0 if pace.left else _TRIES):  # nobody is left to make up for it
            if abs(beyond + spent) < _BELOW / 2 * total:
                break
            change += (beyond + spent) / (parameters.planned(group)[1] / 8 * 1.2)
            spent = tuning_run.code(group, change)
        beyond += spent
        pace.coded()
        loop.keep_only(optimizer, tuning_run.tuned().values())
        while clock.done < pace.until:
            now = tuning_run.iterate(optimizer, loop.warmed(clock, _SCHEDULE.warming))
            clock.tick()
            seen.append((round(tuning_run.passes.seconds, 2), clock.iterations, now))
            if not math.isfinite(now):
                break
        if loop.has_diverged(now, kl) and loop.has_diverged(tuning_run.check(), kl):  # one odd batch means nothing
            tuning_run.job.reporter.note(loop.diverging(clock, "integers", now))
            parameters.code(pace.left, 0.0)
            break
        tuning_run.keep(optimizer, clock, pace.done, beyond)
    return {"stage": "integers", "kl": tuning_run.check(), "on_tuned_tokens": seen[:: max(1, len(seen) // 50)]}


def _values(tuning_run: _TuningRun, clock: Clock, kl: float) -> dict[str, Any]:
    """Tune the values that frozen codes leave free; ends at the best that was validated."""
    optimizer, parameters = tuning_run.optimizer(), tuning_run.parameters
    before = parameters.snapshot()
    best, kept = loop.tune(
        lambda rate: tuning_run.iterate(optimizer, rate), lambda: (tuning_run.check(), parameters.snapshot()),
        clock, _SCHEDULE, kl, tuning_run.job.reporter.note,
    )  # fmt: skip
    parameters.restore(before if kept is None else kept)
    return {"stage": "values", "kl": best}


def tune(
    job: Job,
    planner: Planner,
    state: State,
    quantized_copy: nn.Module,
    slope: float,
    order: Sequence[Sequence[str]] = (),
) -> tuple[tuple[Planner, State] | None, dict[str, Any]]:
    """Tune a plan; returns it settled at about the same bytes, None if nothing measured better, and a record.

    Args:
        job: names the model, the tokens and the effort.
        planner: the units as they were coded.
        state: what would be shipped without recovery.
        quantized_copy: a copy of the model that holds quantized values, overwritten.
        slope: nats per token that a byte buys.
        order: units that are coded along a walk, stage by stage; none by default.
    """
    if is_batches(job.sets.statistics):
        job.reporter.note("recovery needs a module whose forward gives logits: nothing is tuned")
        return None, {}
    effort = job.recover
    assert effort is not None  # noqa: S101 (callers ask first)
    stages: list[dict[str, Any]] = []
    with allocator.no_holes(), same_again(job.device), job.reporter.step("recovery", 1) as advance:
        tuning_run = _TuningRun(job, planner, state, quantized_copy, slope, order)
        start = kl = tuning_run.check()
        most, rest = effort.part(1 - _LAST)
        for stage, part, share in ((_integers, most, 1 - _LAST), (_values, rest, _LAST)):
            clock = Clock(part, advance, share)
            done = stage(tuning_run, clock, kl)
            stages.append({**done, "moves": clock.iterations, "seconds": round(clock.seconds, 1)})
            job.reporter.note(
                f"recovery: {clock.iterations} iterations of {done['stage']} on about "
                f"{tokens_of_iteration(job.device):,} tokens each in {clock.seconds:.0f} s, KL on the correction "
                f"tokens {kl:.4f} before, {done['kl']:.4f} after"
            )
            if done["kl"] < kl:
                kl = done["kl"]
            elif stage is _integers:
                job.reporter.note("recovery: the new integers are no better, the old ones are kept")
                tuning_run.parameters = TunedParameters(planner, state, job.device)
    tuning_run.passes.say_short()
    return tuning_run.parameters.settle() if kl < start else None, {
        "tokens": tuning_run.passes.read,
        "kl_before": start,
        "stages": stages,
        "curve": tuning_run.passes.curve,
    }
