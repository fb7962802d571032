"""Fitting a family of codings to the cap: sampled curves, one slope, real bytes.

`cluscomp` and `reallm` share this. Every matrix has a ladder of settings. Their rates and distortions are estimated on
samples first; the plan of `bytecap.allocate` is then coded for real, real points replace estimated ones, and so on
until the plan is real throughout and fits. A tensor's squared error is priced by one number from the probe, nats per
token and unit of squared error, so that tensors can be compared; inside a tensor the methods stay as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bytecap import sensitivity
from bytecap.allocate import allocate
from bytecap.core import Curve, Plan, Point, Unit
from bytecap.errors import BudgetError, UsageError
from bytecap.methods import Job, Section
from bytecap.methods.uniform import exact_sections, is_exact
from bytecap.model.probe import probe

S = TypeVar("S")
_ROUNDS = 12


@dataclass(frozen=True)
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
        """Nats per token of values (rows, cols) in the weight's place."""
        return self.price * float((values - self.weight).double().square().sum())


@dataclass(frozen=True)
class Coded(Generic[S]):
    """A matrix coded for real.

    Attributes:
        section: tag and bytes.
        distortion: nats per token, predicted.
        kept: what recovery tuning goes on from.
    """

    section: Section
    distortion: float
    kept: S


def prepare(job: Job) -> tuple[list[Material], dict[str, Section]]:
    """Matrices with their prices, and sections of what is stored exactly."""
    model = job.model
    total = sum(len(w.tokens) - 1 for w in job.sets.statistics)
    with job.reporter.step("statistics", total) as advance:
        found = probe(
            model.module, model.units, job.sets.statistics, seed=job.seed, device=job.device, progress=advance
        )
    weights = {u.name: _matrix(u, model.tensor(u)) for u in model.units}
    materials = []
    for u in model.units:
        if is_exact(u) or not u.parameters:
            continue
        rows, cols = u.matrix_shape
        price, columns, energy = 1e-9, torch.ones(cols), torch.ones(rows)  # of no known use
        if u.name in found.uses:
            metric = sensitivity.join(found.uses[u.name], found.tokens)
            diagonal = metric.hessian.mean(0).diagonal().cpu()
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
    flat = values.detach()
    flat = flat.reshape(unit.shape[0], -1) if len(unit.shape) >= 2 and unit.parameters else flat.reshape(1, -1)
    flat = flat.T.contiguous() if unit.transposed and len(unit.shape) >= 2 else flat
    return flat.float() if flat.is_floating_point() and unit.dtype != "F64" else flat


def option(options: Mapping[str, Any], allowed: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Options over their defaults.

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
    """What was chosen for every matrix, coded for real, and the plan it came from."""

    coded: dict[str, Coded[S]]
    plan: Plan


def choose(
    job: Job,
    materials: Sequence[Material],
    stored: Mapping[str, Section],
    curves: Sequence[Curve],
    encode: Callable[[Material, Point], Coded[S]],
    name: str,
) -> Choice[S]:
    """Real sections under the cap.

    Args:
        job: names the budget.
        materials: the matrices.
        stored: sections of everything else.
        curves: one for each matrix; rates may be estimates.
        encode: codes a matrix at a point of its curve.
        name: of the method, for messages.

    Raises:
        BudgetError: the cheapest settings do not fit.
    """
    by_name = {m.unit.name: m for m in materials}
    real: dict[tuple[str, float], Coded[S]] = {}
    curve = {c.name: c for c in curves}
    room = capacity(job, materials, stored)
    plan: Plan | None = None
    with job.reporter.step("coding", _ROUNDS) as advance:
        for _ in range(_ROUNDS):
            advance(1)
            plan = _plan(list(curve.values()), room, job.budget, name)
            fresh = [(n, p) for n, p in plan.choice.items() if (n, p.setting) not in real]
            if not fresh:
                break
            for n, p in fresh:
                found = real[n, p.setting] = encode(by_name[n], p)
                point = Point(len(found.section.data), found.distortion, p.setting)
                curve[n] = Curve(n, tuple(point if q.setting == p.setting else q for q in curve[n].points))
        # only what has been coded for real may be shipped
        only = [
            Curve(n, tuple(p for p in c.points if (n, p.setting) in real)) for n, c in curve.items()
        ]  # fmt: skip
        while True:
            try:
                plan = allocate(only, room)
            except BudgetError:  # estimates were too low throughout: pay for the cheapest setting of everything
                only = [_with_cheapest(c, curve[c.name], by_name[c.name], encode, real) for c in only]
                plan = _plan(only, room, job.budget, name)
            coded = {n: real[n, p.setting] for n, p in plan.choice.items()}
            excess = job.size({**stored, **{n: c.section for n, c in coded.items()}}, b"") - job.budget
            if excess <= 0:
                return Choice(coded, plan)
            room -= excess


def _with_cheapest(
    only: Curve,
    full: Curve,
    material: Material,
    encode: Callable[[Material, Point], Coded[S]],
    real: dict[tuple[str, float], Coded[S]],
) -> Curve:
    cheapest = min(full.points, key=lambda p: p.rate)
    if (only.name, cheapest.setting) in real:
        return only
    found = real[only.name, cheapest.setting] = encode(material, cheapest)
    return Curve(only.name, (*only.points, Point(len(found.section.data), found.distortion, cheapest.setting)))


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


def capacity(job: Job, materials: Sequence[Material], stored: Mapping[str, Section]) -> float:
    """Bytes left for the matrices' sections; what their lengths take in the directory is taken off."""
    blank = {m.unit.name: Section(6, b"") for m in materials}
    lengths = sum(2 if m.unit.parameters < 1 << 18 else 3 for m in materials)
    return float(job.budget - job.size({**stored, **blank}, b"") - lengths)


def sampled(weight: Tensor, generator: torch.Generator, values: int) -> Tensor:
    """Some rows of a matrix (rows, cols), about `values` numbers."""
    rows = max(1, values // max(1, weight.shape[1]))
    if rows >= len(weight):
        return weight
    return weight[torch.randperm(len(weight), generator=generator)[:rows].to(weight.device)]


def entropy_bits(indices: Tensor, n: int) -> float:
    """Bits for an index under an ideal coder of the indices' own histogram."""
    share = torch.bincount(indices, minlength=n).double() / max(1, len(indices))
    share = share[share > 0]
    return float(-(share * share.log2()).sum())
