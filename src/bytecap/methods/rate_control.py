"""Meet the cap on real bytes: every number here is the length of a serialised section, none an estimate.

Tables are frozen, so the file's size is a constant plus the sections' lengths and one unit's bytes can be moved
without touching the others. First the common step is nudged until the whole file is close; then single units'
steps are moved, by 10% at most at once, until a few bytes are left (64 at most, unless the steps are at their limit).
The cap is never exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bytecap.allocation.planner import Planner, State
from bytecap.errors import BudgetError
from bytecap.job import Section
from bytecap.quantization.quantizer import Prepared

Size = Callable[[Mapping[str, Section], bytes], int]

_GLOBAL_TRIES = 8
_UNIT_TRIES = 40
_UNIT_CHANGE = 0.1  # of a unit's log-step at once: more would spend its bytes off the plan's slope
_ENOUGH, _PART = 16, 2**22  # bytes left over that are not worth another rounding; of large files a part of the cap


def allowed_slack(budget: int) -> int:
    """Return the most bytes of a budget that may stay unused.

    >>> allowed_slack(100_000), allowed_slack(3_000_000)
    (64, 1500)
    """
    return max(64, budget // 2000)


@dataclass(frozen=True)
class Packed:
    """A plan as real sections."""

    state: State
    sections: Mapping[str, Section]
    tables: bytes


def _pack(planner: Planner, state: State, tables: bytes) -> Packed:
    """Serialise every unit of a state."""
    sections = planner.sections(state)
    return Packed(replace(state, sections=None), sections, tables)


def fit_to_cap(planner: Planner, state: State, tables: bytes, size: Size, budget: int) -> Packed:
    """Return real sections whose file is at most `budget` bytes and leaves almost nothing unused; see `near_cap`."""
    return _move_units(planner, near_cap(planner, state, tables, size, budget), size, budget)


def near_cap(planner: Planner, state: State, tables: bytes, size: Size, budget: int) -> Packed:
    """Return real sections whose file is at most `budget` bytes, with the common step of all units moved.

    Args:
        planner: the units.
        state: a settled plan close to the budget.
        tables: its tables section, serialised.
        size: file size of given sections and tables.
        budget: the cap in bytes.

    Raises:
        BudgetError: the plan cannot be brought under the cap.
    """
    packed = _pack(planner, state, tables)
    best: Packed | None = None
    slope, before = planner.parameters / 8 * 1.2 + 1, None  # bytes by which the file shrinks an octave-e of the step
    for _ in range(_GLOBAL_TRIES):
        left = budget - size(packed.sections, tables)
        if left >= 0 and (best is None or left < budget - size(best.sections, tables)):
            best = packed
        if 0 <= left <= 2 * allowed_slack(budget):
            break
        if before is not None and (left - before[0]) * before[1] > 0:  # weights that are zero already shrink no more
            slope = (left - before[0]) / before[1]
        change = min(1.0, max(-1.0, (0.5 * allowed_slack(budget) - left) / slope))  # aim a little below the cap
        before = left, change
        steps = {n: s * math.exp(change) for n, s in packed.state.steps.items()}
        packed = _pack(planner, planner.settle(steps, packed.state.rules, refit=False), tables)
    if best is None:
        over = size(packed.sections, tables)
        raise BudgetError(f"the plan could not be brought under {budget} bytes: {over} remain", over)
    return best


def fit_units(
    planner: Planner, state: State, tables: bytes, size: Size, budget: int, names: Sequence[str]
) -> Packed | None:
    """Meet the cap like `fit_to_cap` by rounding only the named matrices anew; None if that is not enough.

    It serves states whose later integers make up for the errors of earlier ones: only the last may still change.
    """
    packed, found = _pack(planner, state, tables), {p.unit.name: p for p in planner.matrices}
    items = [found[n] for n in names]
    tries = [item for item in items for _ in range(2)]
    while (over := size(packed.sections, tables) - budget) > 0:
        if not tries:
            return None
        item = tries.pop(0)
        name = item.unit.name
        change = min(_UNIT_CHANGE, 1.2 * (over + _ENOUGH) / _bytes_per_e(item))
        section, moved = _requantize(planner, packed.state, name, change)
        packed = Packed(moved, {**packed.sections, name: section}, tables)
    return _move_units(planner, packed, size, budget, items)


def _move_units(
    planner: Planner, packed: Packed, size: Size, budget: int, among: Sequence[Prepared] | None = None
) -> Packed:  # fmt: skip
    """Spend what is left by refining single units' steps: few bytes on small units, many on large ones."""
    matrices = planner.matrices if among is None else among
    units = sorted((p for p in matrices if p.unit.parameters), key=lambda p: p.unit.parameters)
    total = size(packed.sections, packed.tables)
    failures, enough = 0, max(_ENOUGH, budget // _PART)
    for _ in range(_UNIT_TRIES if units else 0):
        left = budget - total
        if left <= enough:
            break
        able = [p for p in units if _bytes_per_e(p) * _UNIT_CHANGE >= left]
        item = able[failures % len(able)] if able else units[-1 - failures % len(units)]
        name = item.unit.name
        change = min(_UNIT_CHANGE, 0.8**failures * (left - enough / 2) / _bytes_per_e(item))
        section, moved = _requantize(planner, packed.state, name, -change)
        length = total - packed.sections[name].length + section.length
        if total < length <= budget:
            packed = Packed(moved, {**packed.sections, name: section}, packed.tables)
            total = length
        failures = 0 if able and packed.state is moved else failures + 1
    return packed


def _bytes_per_e(item: Prepared) -> float:
    """Return the most bytes by which a unit grows when its step shrinks by a factor of e."""
    return item.unit.parameters / 8 * math.log2(math.e) + 1


def _requantize(planner: Planner, state: State, name: str, change: float) -> tuple[Section, State]:
    """Round one unit at `exp(change)` times its step; everything else stays as it is."""
    step = state.steps[name] * math.exp(change)
    item = next(p for p in planner.matrices if p.unit.name == name)
    coded = planner.round([item], {name: step}, state.rules)
    moved = replace(
        state, steps={**state.steps, name: step}, coded={**state.coded, name: coded[name]},
        distortions={**state.distortions, name: coded[name].distortion},
    )  # fmt: skip
    return planner.keep_section(Section(*planner.encode(moved, [name])[name])), moved
