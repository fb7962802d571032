"""One slope for the tensors of a runtime's file, and every tensor rounded by it.

Measured curves are allocated, the tensors rounded, and the real loss of every role measured; its factor over the
predicted loss corrects the curves, which are allocated again. Formats differ in what they put in: a coding, and an
allocation that knows how many bytes are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from bytecap.allocation import correction
from bytecap.allocation.budget_curve import margin
from bytecap.allocation.correction import Factor, shrunk
from bytecap.format.decoder import from_matrix
from bytecap.job import Job
from bytecap.model.checkpoint import Model
from bytecap.model.evaluation import kl_each, kl_to
from bytecap.model.quantized_copy import Lazy, Values, copy_of, load_values
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.model.texts import leading
from bytecap.runtimes.gguf.menu import Item
from bytecap.runtimes.gguf.rounding import Coding, Rounded, curves, round_all
from bytecap.runtimes.gguf.stored import keeper
from bytecap.types import Curve, Plan, Point, as_matrix


@dataclass(frozen=True)
class Found:
    """A plan and what was rounded by it.

    Attributes:
        plan: by group, which is a tensor's name unless tensors are bound to each other.
        settings: of every tensor.
        around: what more or fewer bytes would do.
        rounded: every tensor.
        predicted: KL on the correction tokens.
        step: bytes of the smallest step that would still lower the distortion; 0 if there is none.
        vectors: values of vectors that recovery has moved, by name in the file.
    """

    plan: Plan
    settings: Mapping[str, float]
    around: dict[str, Any]
    rounded: dict[str, Rounded]
    predicted: float
    step: int
    vectors: dict[str, Any] = field(default_factory=dict)

    def codes(self) -> Mapping[str, Any]:
        """`Codes` of every tensor, read when they are asked for; None where its numbers are plain."""
        make: Any = lambda name: self.rounded[name].codes  # noqa: E731 (typed as what makes no arrays)
        return Lazy(list(self.rounded), make)


def solve(
    job: Job, items: Sequence[Item], coding: Coding, allocate: Callable[[Sequence[Curve]], tuple[Plan, float]],
    groups: Mapping[str, str] | None = None,
) -> Found:  # fmt: skip
    """The plan and every tensor rounded by it.

    Args:
        job: model, tokens, device.
        items: tensors that compete.
        coding: the family of formats.
        allocate: a plan for curves, and the bytes that were theirs.
        groups: group of a tensor that must take the same setting as others.
    """
    bound = {i.place.name: (groups or {}).get(i.place.name, i.place.name) for i in items}
    with job.reporter.step("types", len(items)) as advance:
        measured = curves(coding, items, advance)
    first = _settings(allocate(_joined(measured, bound))[0], bound)
    quantized_copy = copy_of(job.model.module)
    rounded = _round(job, items, coding, first, {}, {})
    kappa = _factors(job, items, rounded, quantized_copy)
    scaled = _joined([_scaled(c, kappa[c.name]) for c in measured], bound)
    plan, room = allocate(scaled)
    settings = _settings(plan, bound)
    rounded = _round(job, items, coding, settings, first, rounded)
    load_values(quantized_copy, rounded_values(job.model, items, rounded))
    predicted = kl_to(job.model.module, quantized_copy, job.sets.correction, device=job.device)[0]
    return Found(plan, settings, margin(scaled, plan, room), rounded, predicted, smallest_step(scaled, plan))


def _settings(plan: Plan, bound: Mapping[str, str]) -> dict[str, float]:
    return {n: plan.choice[g].setting for n, g in bound.items()}


def _joined(curves: Sequence[Curve], bound: Mapping[str, str]) -> list[Curve]:
    """Curves of groups: sums of their tensors' points of one setting."""
    groups: dict[str, list[Curve]] = {}
    for c in curves:
        groups.setdefault(bound[c.name], []).append(c)
    return [members[0] if len(members) == 1 else _sum(name, members) for name, members in groups.items()]


def _sum(name: str, members: Sequence[Curve]) -> Curve:
    by_setting: dict[float, list[Point]] = {}
    for p in (p for c in members for p in c.points):
        by_setting.setdefault(p.setting, []).append(p)
    points = [
        Point(sum(p.rate for p in found), sum(p.distortion for p in found), setting)
        for setting, found in by_setting.items()
        if len(found) == len(members)
    ]
    return Curve(name, tuple(sorted(points, key=lambda p: p.rate)))


def smallest_step(curves: Sequence[Curve], plan: Plan) -> int:
    """Bytes of the smallest step of any group that lowers its distortion."""
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
    job: Job, items: Sequence[Item], coding: Coding, settings: Mapping[str, float], before: Mapping[str, float],
    known: Mapping[str, Rounded],
) -> dict[str, Rounded]:  # fmt: skip
    """Every tensor in its setting; those that keep the setting they had `before` are known."""
    left = [i for i in items if before.get(i.place.name) != settings[i.place.name]]
    with job.reporter.step("rounding", len(left)) as advance:
        return {**known, **round_all(coding, left, settings, advance, keep_of(job.model))}


def keep_of(model: Model) -> Callable[[Rounded], Rounded]:
    """Return what a job keeps of a rounded tensor: a streamed model's goes to work files."""
    return keeper(model.scratch) if isinstance(model, StreamedModel) else lambda rounded: rounded


def _decoded(rounded: Mapping[str, Rounded], names: Iterable[str]) -> Mapping[str, Any]:
    """Values of rounded tensors by name, read when they are asked for."""
    return Lazy(list(names), lambda name: rounded[name].values)


def unit_values(model: Model, items: Sequence[Item], values: Mapping[str, Any]) -> Values:
    """Decoded tensors of a file as units in stored layout; what other tensors hold of a unit stays original.

    Of a streamed model each is made whenever it is asked for.
    """
    given = set(values)
    units = {u.name: u for u in model.units}
    members: dict[str, list[Item]] = {}
    for item in items:
        if item.place.name in given:
            members.setdefault(item.place.unit, []).append(item)

    def one(name: str) -> Any:
        unit = units[name]
        matrix = as_matrix(unit, model.tensor(unit).detach()).float().cpu().numpy().copy()
        for item in members[name]:
            item.place.to_unit(values[item.place.name], matrix)
        return np.ascontiguousarray(from_matrix(unit, matrix))

    if isinstance(model, StreamedModel):
        return Lazy(list(members), one)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(members, pool.map(one, members), strict=True))


def rounded_values(model: Model, items: Sequence[Item], rounded: Mapping[str, Rounded]) -> Values:
    """Decoded units of rounded tensors, see `unit_values`."""
    return unit_values(model, items, _decoded(rounded, rounded))


def _factors(
    job: Job, items: Sequence[Item], rounded: Mapping[str, Rounded], quantized_copy: nn.Module
) -> dict[str, float]:
    """Measured over predicted loss of every role, at the first plan."""
    roles: dict[str, list[Item]] = {}
    for item in items:
        roles.setdefault(item.role, []).append(item)
    variants = {
        role: unit_values(job.model, members, _decoded(rounded, [m.place.name for m in members]))
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


def figures(job: Job, items: Sequence[Item], found: Found, size: int) -> dict[str, Any]:
    """Return the figures that a report has for every format; `size` is that of the file or directory in bytes."""
    seen, held = (sum(getattr(r, k) for r in found.rounded.values()) for k in ("seen", "held"))
    alone, alone_held = (sum(r.alone[k] for r in found.rounded.values()) for k in (0, 1))
    return {
        "model": job.model.name, "method": "bytecap", "seed": job.seed, "budget_bytes": job.budget, "file_bytes": size,
        "slack_bytes": job.budget - size, "allowed_slack_bytes": found.step, "ideal_bytes": size,
        "parameters": job.model.parameters, "bits_per_parameter": 8 * size / max(1, job.model.parameters),
        "predicted_delta_nats": found.predicted, "slope_nats_per_byte": found.plan.slope,
        "duality_gap_nats": found.plan.gap, "lossless": False, "paths": {}, "margin": found.around,
        "distortion_seen": seen, "distortion_held_out": held, "held_out_over_seen": held / max(seen, 1e-300),
        "windows_held_out_over_seen": alone_held / max(alone, 1e-300),
        "shrinkage": {i.role: i.shrinkage._asdict() for i in items},
        "statistics_tokens": sum(w.predicted for w in job.sets.statistics),
        "correction_tokens": sum(w.predicted for w in job.sets.correction),
    }  # fmt: skip
