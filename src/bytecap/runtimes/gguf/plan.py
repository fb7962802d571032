"""One slope for all tensors of a file, twice: on held-out distortion, then on that corrected by the real loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from bytecap.allocation import correction
from bytecap.allocation.allocate import allocate
from bytecap.allocation.budget_curve import margin
from bytecap.allocation.correction import Factor, shrunk
from bytecap.format.decoder import from_matrix
from bytecap.job import Job
from bytecap.model.checkpoint import Model, as_matrix
from bytecap.model.evaluation import kl_each, kl_to
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.texts import leading
from bytecap.runtimes.gguf.menu import WHOLE, Item, Rounded, curve, round_to
from bytecap.types import Curve, Plan


@dataclass(frozen=True)
class Found:
    """A plan and what was rounded by it.

    Attributes:
        around: what more or fewer bytes would do.
        predicted: KL on the correction tokens.
        step: bytes of the smallest step that would still lower the distortion; 0 if there is none.
        vectors: values of vectors that recovery has moved, by name in the file.
    """

    plan: Plan
    around: dict[str, Any]
    rounded: dict[str, Rounded]
    predicted: float
    step: int
    vectors: dict[str, Any] = field(default_factory=dict)


def solve(job: Job, room: int, items: Sequence[Item]) -> Found:
    """The plan for `room` bytes and every tensor rounded by it."""
    with job.reporter.step("types", len(items)) as advance:
        curves = []
        for item in items:
            curves.append(curve(item))
            advance(1)
    first = allocate(curves, room)
    quantized_copy = copy_of(job.model.module)
    rounded = _round(job, items, first, {})
    kappa = _factors(job, items, rounded, quantized_copy)
    curves = [_scaled(c, kappa[c.name]) for c in curves]
    plan = allocate(curves, room)
    rounded = _round(job, items, plan, {n: (first.choice[n].setting, r) for n, r in rounded.items()})
    load_values(quantized_copy, unit_values(job.model, items, {n: r.values for n, r in rounded.items()}))
    predicted = kl_to(job.model.module, quantized_copy, job.sets.correction, device=job.device)[0]
    return Found(plan, margin(curves, plan, room), rounded, predicted, _smallest_step(curves, plan))


def _smallest_step(curves: Sequence[Curve], plan: Plan) -> int:
    """Bytes of the smallest step of any tensor that lowers its distortion."""
    steps = [
        p.rate - plan.choice[c.name].rate
        for c in curves
        for p in c.points
        if p.distortion < plan.choice[c.name].distortion and p.rate > plan.choice[c.name].rate
    ]
    return int(min(steps, default=0))


def _scaled(found: Curve, factor: float) -> Curve:
    return Curve(found.name, tuple(replace(p, distortion=factor * p.distortion) for p in found.points))


def _round(
    job: Job, items: Sequence[Item], plan: Plan, known: Mapping[str, tuple[float, Rounded]]
) -> dict[str, Rounded]:
    """Every tensor in the type that the plan gives it."""
    found = {}
    with job.reporter.step("rounding", len(items)) as advance:
        for item in items:
            name, setting = item.place.name, plan.choice[item.place.name].setting
            if name in known and known[name][0] == setting:
                found[name] = known[name][1]
            else:
                found[name] = round_to(item, WHOLE[int(setting)])
            advance(1)
    return found


def unit_values(model: Model, items: Sequence[Item], values: Mapping[str, Any]) -> dict[str, Any]:
    """Decoded tensors of the file as units in stored layout; what other tensors hold of a unit stays original."""
    units = {u.name: u for u in model.units}
    matrices: dict[str, Any] = {}
    for item in items:
        if item.place.name in values:
            unit = units[item.place.unit]
            if unit.name not in matrices:
                matrices[unit.name] = as_matrix(unit, model.tensor(unit).detach()).float().cpu().numpy().copy()
            item.place.to_unit(values[item.place.name], matrices[unit.name])
    return {n: from_matrix(units[n], np.ascontiguousarray(m)) for n, m in matrices.items()}


def _factors(
    job: Job, items: Sequence[Item], rounded: Mapping[str, Rounded], quantized_copy: nn.Module
) -> dict[str, float]:
    """Measured over predicted loss of every role, at the first plan."""
    roles: dict[str, list[Item]] = {}
    for item in items:
        roles.setdefault(item.role, []).append(item)
    variants = {
        role: unit_values(job.model, members, {m.place.name: rounded[m.place.name].values for m in members})
        for role, members in roles.items()
    }
    with job.reporter.step("correction factors", len(roles)) as advance:
        windows = leading(job.sets.correction, correction.TOKENS)
        measured = kl_each(job.model.module, quantized_copy, variants, windows, device=job.device, advance=advance)
    found: dict[str, Factor] = {}
    for role, members in roles.items():
        names = [m.place.name for m in members]
        found |= dict.fromkeys(names, Factor.of(measured[role], sum(rounded[n].held for n in names)))
    return shrunk(found)
