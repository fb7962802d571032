"""Let any method code the rest of a model beside units that are coded already.

The model runs with their values in place, so statistics, correction factors and drift of all others are those of the
model as it is stored. Nothing is taken from a store: entries do not know what was given.
"""

from __future__ import annotations

from dataclasses import replace

from bytecap.errors import UsageError
from bytecap.job import Job, Method, Outcome, Section
from bytecap.system.cache import Store


def run_rest(run: Method, job: Job) -> Outcome:
    """Run a method on a job beside its given sections.

    Raises:
        UsageError: a given section belongs to no unit.
    """
    if not job.given:
        return run(job)
    names = [u.name for u in job.model.units]
    strange = sorted(set(job.given) - set(names))
    if strange:
        raise UsageError(f"a section was given for {strange[0]}, which is no unit of {job.model.name}")

    def size(sections: dict[str, Section], tables: bytes, objects: tuple[bytes, ...] = ()) -> int:
        return job.size({**sections, **job.given}, tables, objects)

    rest = replace(job.model, units=tuple(u for u in job.model.units if u.name not in job.given))
    if not rest.units:
        return Outcome(dict(job.given), b"", 0.0, 0.0, 0.0, "given")
    outcome = run(replace(job, model=rest, size=size, config=replace(job.config, given={}), store=Store()))
    return replace(outcome, sections={**outcome.sections, **job.given}) if outcome.sections else outcome
