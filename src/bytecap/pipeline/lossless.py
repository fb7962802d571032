"""Store a model without any loss, where the budget holds that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bytecap.errors import CorruptError
from bytecap.format import container
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.coders.exact import WIDTH
from bytecap.format.container import Contents
from bytecap.format.decoder import decode_each
from bytecap.job import Job, Section
from bytecap.model.checkpoint import Model
from bytecap.pipeline import update
from bytecap.pipeline.update import Frame
from bytecap.types import as_matrix


def lossless(model: Model, frame: Frame, job: Job) -> Contents | None:
    """Code the model without loss, if that fits the budget; of an update all that is not the base's bit for bit."""
    budget, sections = job.budget, {}
    as_held = {u.name: as_matrix(u, model.tensor(u).detach().cpu().numpy()) for u in model.units} if job.base else {}
    changed = [u for u in model.units if not (job.base and job.base.has(u, as_held[u.name]))]
    raw = sum(u.parameters * {"F64": 8, "F32": 4}.get(u.dtype, 2) for u in changed)
    if budget < 0.4 * raw:  # entropy coding takes a third off bfloat16 weights, never more than half off any
        return None
    units = {u.name: u for u in model.units}
    with job.reporter.step("lossless size", len(changed)) as advance:
        for u in changed:
            values = as_matrix(u, model.tensor(u).detach().cpu().numpy())
            narrowed = u.dtype not in WIDTH or (u.dtype == "F64" and values.dtype != np.float64)
            units[u.name] = replace(u, dtype="F32" if narrowed else u.dtype)
            sections[u.name] = Section(EXACT.tag, EXACT.encode(values, units[u.name].dtype))
            advance(1)
    kept = {n: update.AS_IN_BASE for n in units if n not in sections}
    exact = replace(frame, about={**frame.about, "lossless": not model.rounded})
    contents = exact.contents(tuple(units.values()), {**sections, **kept}, b"")
    total = container.size(contents)
    if total > budget:
        return None
    _check_lossless(model, contents)
    said = f"float64 rounded to float32, {min(model.rounded)} and others" if model.rounded else "without any loss"
    job.reporter.note(f"the budget holds the model losslessly ({total:,} bytes): stored {said}")
    return contents


def _check_lossless(model: Model, contents: Contents) -> None:
    """Decode what is about to be called lossless and compare it."""
    for unit, values in decode_each(contents):
        held = model.tensor(unit).detach().cpu().numpy()
        if not np.array_equal(values, held, equal_nan=held.dtype.kind == "f"):
            raise CorruptError(f"unit {unit.name} does not come back as it was stored: nothing is written")
