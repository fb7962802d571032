"""Fill budgets just below lossless with floats that keep fewer bits of their mantissa.

A grid's integers stop at 16 bits, so above its finest step a budget would be left unused: for a float32 model from
about 14 bits a weight on, for 16-bit models with far outliers just below the lossless size. There the source's own
floats are kept, rounded to the most mantissa bits that fit; one bit more goes to the first units, and inside one
unit to the first values, until the cap is met. Written with the `exact` coder, whose tables skip what never occurs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bytecap.allocation.preparation import PreparedModel
from bytecap.errors import BudgetError
from bytecap.job import Job, Outcome, Section
from bytecap.methods.rate_control import allowed_slack
from bytecap.quantization.short_floats import section
from bytecap.types import Unit, as_matrix

_MANTISSA = {"F64": 23, "F32": 23, "F16": 10, "BF16": 7}
_TRIES = 24

Array = npt.NDArray[np.float32]
Values = Callable[[Unit], Array]


def fit_floats(
    units: list[Unit], values: Values, size: Callable[[dict[str, Section]], int], budget: int
) -> dict[str, Section] | None:
    """Return sections that fill the budget, or None if even one mantissa bit does not fit.

    Args:
        units: floating-point units.
        values: (rows, cols) float32 values of one.
        size: file size with given sections of these units.
        budget: cap on it in bytes.
    """
    most = max((_MANTISSA[u.dtype] for u in units), default=1)

    def at(bits: int) -> dict[str, Section]:
        return {u.name: section(values(u), u.dtype, min(bits, _MANTISSA[u.dtype])) for u in units}

    low, high, best = 0, most + 1, None  # bits that fit, bits that do not
    while high - low > 1:
        middle = (low + high) // 2
        found = at(middle)
        if size(found) <= budget:
            low, best = middle, found
        else:
            high = middle
    return None if best is None else _fill(units, values, size, budget, best, low)


def _fill(
    units: list[Unit], values: Values, size: Callable[[dict[str, Section]], int], budget: int,
    best: dict[str, Section], bits: int,
) -> dict[str, Section]:  # fmt: skip
    """Give one more bit to whole units while they fit, then to the first values of those that do not."""
    for unit in sorted(units, key=lambda u: -u.parameters):
        if bits >= _MANTISSA[unit.dtype] or budget - size(best) <= 8:
            continue
        low, high = 0, unit.parameters + 1  # values with one more bit that fit, that do not
        trial = unit.parameters
        for _ in range(_TRIES):
            found = best | {unit.name: section(values(unit), unit.dtype, bits, trial)}
            if size(found) <= budget:
                best, low = found, trial
            else:
                high = trial
            if high - low <= 1 or (low and budget - size(best) <= min(48, allowed_slack(budget))):
                break
            trial = (low + high) // 2
    return best


def store_floats(job: Job, prepared: PreparedModel) -> Outcome:
    """Fill a budget that the finest grids leave unused.

    Raises:
        BudgetError: nothing fills it.
    """
    units = [u for u in job.model.units if u.name not in prepared.fixed]
    with job.reporter.step("floats of fewer bits", 1):
        sections = fit_floats(
            units, lambda u: as_matrix(u, job.model.tensor(u).detach().float().cpu()).numpy(),
            lambda s: job.size({**s, **prepared.fixed}, b""), job.budget,
        )  # fmt: skip
    if sections is None:
        raise BudgetError(f"no plan fills {job.budget:,} bytes", job.budget)
    return Outcome({**sections, **prepared.fixed}, b"", 0.0, 0.0, 0.0, "floats")
