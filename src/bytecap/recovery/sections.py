"""Tune the continuous values of finished sections of any coder, with frozen codes.

A coder or overlay that has some says so (`Continuous` in `bytecap.format.coders`): codewords, decoders, low-rank parts,
scales, protected columns, rows, channels and outliers, vectors. Adam tunes them end to end by the KL to the original.
From time to time they are written as a file holds them and measured on the correction tokens; what is shipped is the
best of that, if it is better than the sections were and its file keeps the cap.

Sources: ClusComp (ACL 2025), ReALLM (arXiv:2405.13155) and OWQ (arXiv:2306.02272) tune what their formats leave
continuous; here that is one loop for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bytecap.format.coders import Continuous, Shared, coder, run
from bytecap.format.decoder import from_matrix
from bytecap.format.entropy.shared_tables import load_shared
from bytecap.format.wire.shared_objects import load_objects
from bytecap.job import Job, Outcome, Section
from bytecap.model.batches import is_batches
from bytecap.model.quantized_copy import Lazy, as_stored, copy_of, load_values
from bytecap.recovery import loop
from bytecap.recovery.kl_passes import Passes, same_again
from bytecap.recovery.loop import Clock, Schedule
from bytecap.types import Unit

RATE = 0.002  # first learning rate, in mean sizes of an array
_SCHEDULE = Schedule(warming=10, checks=8, apart=5)


@dataclass(frozen=True)
class _Part:
    """A unit to tune: its section, the continuous arrays in it, and those as leaves."""

    unit: Unit
    section: Section
    continuous: Continuous
    leaves: dict[str, Tensor]

    def values(self) -> Tensor:
        """Return the values in stored layout, with gradient."""
        matrix = self.continuous.matrix(self.leaves, None)
        return as_stored(self.unit, matrix)

    def written(self) -> Section:
        """Return the section as a file would hold it now."""
        arrays = {n: t.detach().cpu().numpy() for n, t in self.leaves.items()}
        return Section(self.section.tag, self.continuous.encode(arrays))


def parts_of(job: Job, sections: Mapping[str, Section], shared: Shared) -> dict[str, _Part]:
    """Return all units that have continuous arrays."""
    found = {}
    for u in job.model.units:
        section = sections[u.name]
        owner: Any = coder(section.tag)
        if not u.dtype.startswith(("F", "BF")) or not hasattr(owner, "continuous"):
            continue
        continuous = owner.continuous(section.data, u.matrix_shape, shared)
        if continuous.arrays:
            leaves = {
                n: torch.tensor(a, dtype=torch.float32, device=job.device, requires_grad=True)
                for n, a in continuous.arrays.items()
            }
            found[u.name] = _Part(u, section, continuous, leaves)
    return found


def _decoded(job: Job, sections: Mapping[str, Section], shared: Shared) -> Lazy:
    """Decode the values of units as a reader does."""
    units = {u.name: u for u in job.model.units}

    def one(name: str) -> Any:
        u, section = units[name], sections[name]
        matrix = run([coder(section.tag).decode(section.data, u.matrix_shape, u.dtype, shared)])[0]
        return from_matrix(u, matrix)

    return Lazy(list(sections), one)


class _Tuning:
    """The tuning of one job."""

    def __init__(self, job: Job, outcome: Outcome) -> None:
        self.job, self.outcome = job, outcome
        self.shared = replace(load_shared(outcome.tables), objects=load_objects(outcome.objects))
        self.parts = parts_of(job, outcome.sections, self.shared)
        self.quantized_copy = copy_of(job.model.module)
        load_values(self.quantized_copy, _decoded(job, outcome.sections, self.shared))
        self.passes = Passes(job, self.quantized_copy)
        leaves = [t for p in self.parts.values() for t in p.leaves.values()]
        self.optimizer = loop.adam((t, RATE * max(float(t.detach().abs().mean()), 1e-8)) for t in leaves)

    def iterate(self, rate: float) -> float:
        """Make one iteration at a share of the first rates; returns the mean KL before it."""
        self.optimizer.zero_grad()
        kl = self.passes.backward({n: p.values() for n, p in self.parts.items()})
        loop.set_rates(self.optimizer, rate)
        self.optimizer.step()
        return kl

    def check(self) -> tuple[float, dict[str, Section] | None]:
        """Return the KL on the correction tokens of sections as they would be written now, and all if they fit."""
        new = {n: p.written() for n, p in self.parts.items()}
        load_values(self.quantized_copy, _decoded(self.job, new, self.shared))
        kl, sections = self.passes.check(), {**self.outcome.sections, **new}
        fit = self.job.size(sections, self.outcome.tables, self.outcome.objects) <= self.job.budget
        return kl, sections if fit else None


def _joined(own: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Join the record of a method's own recovery and that of a later one."""
    seconds, iterations, _ = own["curve"][-1] if own["curve"] else (0.0, 0, 0.0)
    return own | {
        "tokens": own["tokens"] + later["tokens"],
        "stages": [*own["stages"], *later["stages"]],
        "curve": [*own["curve"], *((seconds + s, iterations + i, kl) for s, i, kl in later["curve"])],
    }


def tune_sections(job: Job, outcome: Outcome) -> Outcome:
    """Return the outcome with tuned sections, where that measured better and keeps the cap.

    A number of iterations is spent as it is; of a time, what a method itself has used is not taken off.
    """
    effort = job.recover
    assert effort is not None  # noqa: S101 (callers ask first)
    if is_batches(job.sets.statistics):
        job.reporter.note("recovery needs a module whose forward gives logits: nothing is tuned")
        return outcome
    tuning = _Tuning(job, outcome)
    if not tuning.parts:
        job.reporter.note("recovery: no coder of these sections has anything continuous: nothing is tuned")
        return outcome
    start = tuning.passes.check()
    with same_again(job.device), job.reporter.step("recovery of continuous values", 1) as advance:
        clock = Clock(effort, advance)
        best, kept = loop.tune(tuning.iterate, tuning.check, clock, _SCHEDULE, start, job.reporter.note)
    names = ", ".join(sorted({coder(p.section.tag).id for p in tuning.parts.values()}))
    job.reporter.note(
        f"recovery: {clock.iterations} iterations of the continuous values of {len(tuning.parts)} units ({names}), KL "
        f"on the correction tokens {start:.4f} before, {best:.4f} after"
    )
    tuning.passes.say_short()
    stage = {"stage": "continuous", "moves": clock.iterations, "kl": best}
    record = {"tokens": tuning.passes.read, "kl_before": start, "stages": [stage], "curve": tuning.passes.curve}
    if outcome.recovery:  # the method's own
        record = _joined(outcome.recovery, record)
    if kept is None:
        return replace(outcome, recovery=record)
    plain = outcome.before or (outcome.sections, outcome.tables)
    return replace(outcome, sections=kept, recovery=record, before=plain, predicted=best)
