"""Fit a family of codings to the cap, by sampled curves, one slope, and real bytes.

`cluscomp` and `reallm` share this. Every matrix has a ladder of settings. Their rates and distortions are estimated on
samples first; the plan of `bytecap.allocation.allocate` is then coded for real, real points replace estimated ones, and
so on until the plan is real throughout and fits. A tensor's squared error is priced by one number from the probe, nats
per token and unit of squared error, so that tensors can be compared; inside a tensor the methods stay as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from bytecap.allocation.allocate import allocate
from bytecap.calibration import metric as sensitivity
from bytecap.calibration.statistics import moments
from bytecap.errors import BudgetError, UsageError
from bytecap.format.coders import Shared, coder
from bytecap.format.coders import run as decode_alone
from bytecap.format.decoder import from_matrix
from bytecap.format.wire.shared_objects import load_objects
from bytecap.job import Job, Outcome, Section
from bytecap.methods.baselines.uniform import exact_sections, is_exact
from bytecap.model.evaluation import kl_to
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.types import Curve, Plan, Point, Unit, as_matrix

S = TypeVar("S")
_ROUNDS = 6


@dataclass(frozen=True, eq=False)
class Material:
    """A matrix to code.

    Attributes:
        unit: the unit.
        weight: float32 (rows, cols), on the job's device.
        price: nats per token of a squared error of 1 spread over the matrix.
        columns: (cols,) relative importance, mean 1.
        rows: (rows,) relative importance, mean 1.
    """

    unit: Unit
    weight: Tensor
    price: float
    columns: Tensor
    rows: Tensor

    def distortion(self, values: Tensor) -> float:
        """Return the nats per token that values (rows, cols) in the weight's place cost."""
        return self.price * float((values - self.weight).double().square().sum())


@dataclass(frozen=True)
class Coded(Generic[S]):
    """A matrix that is coded for real, except for its entropy coding.

    Attributes:
        size: bytes of the section, estimated where indices are entropy coded.
        distortion: nats per token, predicted.
        kept: what the section is made from, and recovery tuning goes on with.
    """

    size: int
    distortion: float
    kept: S


class Family(Protocol[S]):
    """The interface by which a method describes its codings to `choose`."""

    @property
    def name(self) -> str:
        """Name of the method."""
        ...

    def encode(self, material: Material, setting: float) -> Coded[S]:
        """Code a matrix at a setting of its curve."""
        ...

    def section(self, material: Material, kept: S) -> Section:
        """Return a matrix's section."""
        ...

    def kind(self, setting: float) -> int:
        """Return the kind of a setting; settings of one kind are estimated alike."""
        ...


def prepare(job: Job) -> tuple[list[Material], dict[str, Section]]:
    """Return matrices with their prices, and sections of the units that are stored exactly."""
    model = job.model
    found = moments(job)
    weights = {u.name: _matrix(u, model.tensor(u)) for u in model.units}
    materials = []
    for u in model.units:
        if is_exact(u) or not u.parameters:
            continue
        rows, cols = u.matrix_shape
        price, columns, energy = 1e-9, torch.ones(cols), torch.ones(rows)  # of no known use
        if u.name in found.uses:
            metric = sensitivity.join(found.uses[u.name], found.tokens)
            diagonal = metric.hessian.diagonal().cpu()
            price, columns = float(diagonal.mean()) / 2, (diagonal / diagonal.mean().clamp(min=1e-30)).float()
            energy = metric.rows.cpu().float()
        device = torch.device(job.device)
        materials.append(Material(u, weights[u.name].to(device), price, columns.to(device), energy.to(device)))
    stored = exact_sections(model.units, {n: w.cpu() for n, w in weights.items()})
    empty = [u for u in model.units if u.name not in stored and not u.parameters]
    if empty:
        stored |= exact_sections([replace(u, linear=False) for u in empty], {n: w.cpu() for n, w in weights.items()})
    return materials, stored


def _matrix(unit: Unit, values: Tensor) -> Tensor:
    flat = as_matrix(unit, values.detach()).contiguous()
    return flat.float() if flat.is_floating_point() and unit.dtype != "F64" else flat


def option(options: Mapping[str, Any], allowed: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return options over their defaults.

    Raises:
        UsageError: an option that the method does not have, or an unknown accounting.
    """
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise UsageError(f"method {name} has no option {unknown[0]!r} (there are {', '.join(allowed)})")
    found = {**allowed, **options}
    if found["accounting"] not in {"published", "coded"}:
        raise UsageError(f"accounting is published or coded, not {found['accounting']!r}")
    return found


@dataclass(frozen=True)
class Choice(Generic[S]):
    """The setting and section of every matrix, and the plan they came from."""

    kept: dict[str, S]
    sections: dict[str, Section]
    plan: Plan


def choose(
    job: Job, materials: Sequence[Material], stored: Mapping[str, Section], curves: Sequence[Curve], family: Family[S]
) -> Choice[S]:
    """Choose settings and code real sections under the cap.

    Args:
        job: names the budget.
        materials: the matrices.
        stored: sections of everything else.
        curves: one for each matrix; rates may be estimates.
        family: codes matrices.

    Raises:
        BudgetError: the cheapest settings do not fit.
    """
    by_name = {m.unit.name: m for m in materials}
    tried: dict[tuple[str, float], Coded[S]] = {}
    curve = {c.name: c for c in curves}
    room = capacity(job, materials, stored)

    def attempt(n: str, setting: float) -> None:
        found = tried[n, setting] = family.encode(by_name[n], setting)
        curve[n] = _calibrated(
            curve[n], Point(found.size, found.distortion, setting), {s for k, s in tried if k == n}, family
        )

    with job.reporter.step("coding", _ROUNDS) as advance:
        for _ in range(_ROUNDS):
            plan = _plan(list(curve.values()), room, job.budget, family.name)
            fresh = [(n, p.setting) for n, p in plan.choice.items() if (n, p.setting) not in tried]
            for n, setting in fresh:
                attempt(n, setting)
            advance(1)
    return _settle(job, by_name, stored, curve, tried, attempt, room, family)


def _settle(
    job: Job,
    materials: Mapping[str, Material],
    stored: Mapping[str, Section],
    curve: dict[str, Curve],
    tried: Mapping[tuple[str, float], Coded[S]],
    attempt: Callable[[str, float], None],
    room: float,
    family: Family[S],
) -> Choice[S]:
    """Code the chosen settings for real until they fit."""
    written: dict[tuple[str, float], Section] = {}
    while True:
        only = [_only(c, tried, written) for c in curve.values()]
        try:
            plan = allocate(only, room)
        except BudgetError:  # what was tried is too large: try the cheapest setting of everything
            for n in list(curve):
                cheapest = min(curve[n].points, key=lambda p: p.rate).setting
                if (n, cheapest) not in tried:
                    attempt(n, cheapest)
            plan = _plan([_only(c, tried, written) for c in curve.values()], room, job.budget, family.name)
        chosen = {n: p.setting for n, p in plan.choice.items()}
        fresh = [key for key in chosen.items() if key not in written]
        for n, setting in fresh:
            written[n, setting] = family.section(materials[n], tried[n, setting].kept)
        sections = {n: written[n, setting] for n, setting in chosen.items()}
        excess = job.size({**stored, **sections}, b"") - job.budget
        if excess <= 0:
            return Choice({n: tried[n, s].kept for n, s in chosen.items()}, sections, plan)
        room -= 0 if fresh else excess  # real sizes alone may already change the plan


def _only(curve: Curve, tried: Mapping[tuple[str, float], Any], written: Mapping[tuple[str, float], Section]) -> Curve:
    """Return the points that were tried, with real sizes where sections are written."""
    points = []
    for p in curve.points:
        key = (curve.name, p.setting)
        if key in tried:
            points.append(replace(p, rate=float(len(written[key].data))) if key in written else p)
    return Curve(curve.name, tuple(points))


def _calibrated(curve: Curve, point: Point, tried: set[float], family: Family[Any]) -> Curve:
    """Put a real point into a curve; estimated points of its kind move with it."""
    old = next(p for p in curve.points if p.setting == point.setting)
    wider, worse = point.rate / max(old.rate, 1e-30), point.distortion / max(old.distortion, 1e-30)
    kind = family.kind(point.setting)
    moved = [
        Point(p.rate * wider, p.distortion * worse, p.setting)
        if p.setting not in tried and family.kind(p.setting) == kind
        else p
        for p in curve.points
        if p.setting != point.setting
    ]
    return Curve(curve.name, (*moved, point))


def _plan(curves: Sequence[Curve], room: float, budget: int, name: str) -> Plan:
    try:
        return allocate(curves, room)
    except BudgetError as exc:
        floor = math.ceil(exc.floor + budget - room)
        largest = max(curves, key=lambda c: min(p.rate for p in c.points))
        raise BudgetError(
            f"a budget of {budget:,} bytes is below the smallest size of about {floor:,} that {name} reaches; "
            f"the largest unit is {largest.name}",
            floor,
        ) from exc


def finish(
    job: Job, choice: Choice[Any], sections: Mapping[str, Section], name: str, objects: tuple[bytes, ...] = ()
) -> Outcome:
    """Return the outcome of sections under the cap, with its KL predicted on the correction tokens."""
    quantized_copy = copy_of(job.model.module)
    shared = Shared(objects=load_objects(objects))
    for u in job.model.units:
        s = sections[u.name]
        values = decode_alone([coder(s.tag).decode(s.data, u.matrix_shape, u.dtype, shared)])[0]
        load_values(quantized_copy, {u.name: from_matrix(u, values)})
    with job.reporter.step("prediction", 1):
        predicted, _ = kl_to(job.model.module, quantized_copy, job.sets.correction, device=job.device)
    ordered = {u.name: sections[u.name] for u in job.model.units}
    return Outcome(ordered, b"", predicted, choice.plan.slope, choice.plan.gap, name, objects)


def capacity(job: Job, materials: Sequence[Material], stored: Mapping[str, Section]) -> float:
    """Return the bytes left for the matrices' sections, less what their lengths take in the directory."""
    blank = {m.unit.name: Section(6, b"") for m in materials}
    lengths = sum(2 if m.unit.parameters < 1 << 18 else 3 for m in materials)
    return float(job.budget - job.size({**stored, **blank}, b"") - lengths)


def sampled(weight: Tensor, generator: torch.Generator, values: int) -> Tensor:
    """Return some rows of a matrix (rows, cols), about `values` numbers."""
    rows = max(1, values // max(1, weight.shape[1]))
    if rows >= len(weight):
        return weight
    return weight[torch.randperm(len(weight), generator=generator)[:rows].to(weight.device)]


def entropy_bits(indices: Tensor, n: int) -> float:
    """Return the bits of an index under an ideal coder of the indices' own histogram."""
    share = torch.bincount(indices, minlength=n).double() / max(1, len(indices))
    share = share[share > 0]
    return float(-(share * share.log2()).sum())
