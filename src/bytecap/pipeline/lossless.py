"""Store a model without any loss, where the budget holds that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from bytecap.errors import CorruptError
from bytecap.format import container
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.coders.exact import WIDTH
from bytecap.format.container import Contents, FileSection, UnitSection
from bytecap.format.decoder import decode_each
from bytecap.model.checkpoint import Model, as_matrix
from bytecap.progress import Reporter


def lossless(
    model: Model, files: tuple[FileSection, ...], about: dict[str, Any], budget: int, reporter: Reporter
) -> Contents | None:
    """Code the model without loss, if that fits the budget."""
    raw = sum(u.parameters * {"F64": 8, "F32": 4}.get(u.dtype, 2) for u in model.units)
    if budget < 0.4 * raw:  # entropy coding takes a third off bfloat16 weights, never more than half off any
        return None
    units = []
    with reporter.step("lossless size", len(model.units)) as advance:
        for u in model.units:
            values = as_matrix(u, model.tensor(u).detach().cpu().numpy())
            narrowed = u.dtype not in WIDTH or (u.dtype == "F64" and values.dtype != np.float64)
            dtype = "F32" if narrowed else u.dtype
            units.append(UnitSection(replace(u, dtype=dtype), EXACT.tag, EXACT.encode(values, dtype)))
            advance(1)
    contents = Contents(tuple(units), b"", files, {**about, "lossless": not model.rounded})
    total = container.size(contents)
    if total > budget:
        return None
    _check_lossless(model, contents)
    said = f"float64 rounded to float32, {min(model.rounded)} and others" if model.rounded else "without any loss"
    reporter.note(f"the budget holds the model losslessly ({total:,} bytes): stored {said}")
    return contents


def _check_lossless(model: Model, contents: Contents) -> None:
    """Decode what is about to be called lossless and compare it."""
    for unit, values in decode_each(contents):
        held = model.tensor(unit).detach().cpu().numpy()
        if not np.array_equal(values, held, equal_nan=held.dtype.kind == "f"):
            raise CorruptError(f"unit {unit.name} does not come back as it was stored: nothing is written")
