"""Build the operating point of curves from a model and a budget: statistics, coded base, and a copy that holds it.

Statistics and operating points are kept in the store, so that a second budget reuses the one and a second run both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
from torch import nn

from bytecap.allocation.correction import TOKENS, Factor, role_name, shrunk
from bytecap.allocation.overlaid import problem_of
from bytecap.allocation.planner import State
from bytecap.allocation.plans import allocated_plan
from bytecap.calibration.residual_streams import streams_of
from bytecap.calibration.statistics import job_key, windows_key
from bytecap.calibration.sums import Statistics
from bytecap.errors import BudgetError, UsageError
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.decoder import from_matrix
from bytecap.format.entropy.shared_tables import dump_shared, load_shared
from bytecap.job import Job, Section
from bytecap.job.config import FitConfig
from bytecap.methods.bytecap import calibrate, prepare
from bytecap.model.checkpoint import Model
from bytecap.model.evaluation import kl_each
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.model.texts import TokenSets, leading
from bytecap.pipeline import stages
from bytecap.quantization.options import Options
from bytecap.quantization.overlays.channels import rank
from bytecap.system import allocator
from bytecap.system.cache import Store, digest
from bytecap.types import as_matrix
from bytecap_lab.rd_curves.base import Base, GolfBase, GridBase, golf_k
from bytecap_lab.rd_curves.slopes import Slopes, measure_slopes

BASES = ("grid", "golf")
MOST_SETTINGS = 8  # settings of one path on one unit
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class OperatingPoint:
    """The base from which every overlay starts.

    Attributes:
        job: model, texts, budget.
        base: the operating point.
        sections: of the base's units, real bytes.
        quantized_copy: a module that holds the base's decoded values.
        slopes: the KL's expansion there.
        key: hash of all of it.
        most_settings: most settings that a path is tried with on a unit.
    """

    job: Job
    base: Base
    sections: Mapping[str, Section]
    quantized_copy: nn.Module
    slopes: Slopes
    key: str
    most_settings: int = MOST_SETTINGS

    @property
    def bytes(self) -> int:
        """Bytes of the base's sections."""
        return sum(len(s.data) for s in self.sections.values())


def check_base(name: str) -> str:
    """Check the name of a base."""
    if name not in BASES:
        raise UsageError(f"unknown base {name!r}: use {' or '.join(BASES)}")
    return name


def make_job(model: Model, sets: TokenSets, budget: int, device: str, seed: int, reporter: Any) -> Job:
    """Make the job that `fit` would work on; budgets that leave nothing to recover are refused."""
    job = stages.make_job(model, sets, FitConfig(budget, device=device, seed=seed, reporter=reporter))
    if budget >= job.size({u.name: Section(EXACT.tag, bytes(2 * u.parameters)) for u in model.units}, b""):
        raise UsageError(f"a budget of {budget:,} bytes holds the model losslessly: no byte can recover anything")
    return job


def build(job: Job, base: str, store: Store, most_settings: int = MOST_SETTINGS) -> OperatingPoint:
    """The operating point of a job.

    Args:
        job: model, texts, budget.
        base: `grid` or `golf`.
        store: where statistics and operating points are kept.
        most_settings: most settings that a path is tried with on a unit.

    Raises:
        BudgetError: the base cannot get below the budget.
    """
    options = Options()
    job = replace(job, store=store)
    key, found = job_key(job), calibrate(job, options)
    key = digest(key, base, job.budget, windows_key(job.sets.correction))
    made, rest = (_grid if base == "grid" else _golf)(job, options, found, store, key)
    made = replace(_with_rankings(job, made), device=job.device)
    sections = dict(zip(made.units, made.sections(list(made.units.values())), strict=True))
    quantized_copy = copy_of(job.model.module)
    units = {u.name: u for u in job.model.units}
    load_values(quantized_copy, {n: from_matrix(units[n], r.values.numpy()) for n, r in made.units.items()} | rest)
    allocator.release()
    hashed = digest(key, *[s.data for s in sections.values()], *rest.values())
    slopes = measure_slopes(job, made, quantized_copy, store, hashed)
    return OperatingPoint(job, made, sections, quantized_copy, slopes, digest(hashed, most_settings), most_settings)


def _with_rankings(job: Job, base: GridBase | GolfBase) -> GridBase | GolfBase:
    """Tell every matrix which streams it is on, and the worth of their channels to all of their matrices."""
    streams = streams_of(job.model.module, job.model.units, job.sets.statistics)
    found = rank(streams, ((p, base.units[n].values) for n, p in base.problems.items()), base.kappa)
    return replace(base, problems={n: replace(p, rankings=found[n]) for n, p in base.problems.items()})


def _grid(job: Job, options: Options, found: Statistics, store: Store, key: str) -> tuple[GridBase, dict[str, Array]]:
    """The grid base and the decoded values of all other units."""
    kept = store.get(digest(key, "plan"))
    prepared = prepare(job, options, found)
    planner = prepared.planner
    state, kappa = allocated_plan(job, prepared, kept["steps"] if kept else None)
    if kept is None:
        kept = {"steps": dict(state.steps), "kappa": kappa, "tables": dump_shared(state.shared).hex()}
        store.put(digest(key, "plan"), kept)
    stored = load_shared(bytes.fromhex(kept["tables"]))
    rules = replace(state.rules, shared=stored).with_offsets(stored.offset)
    state = State(kept["steps"], {}, rules, {}, {})
    base = GridBase.of(planner, rules, kept["steps"], kept["kappa"])
    rest = {v.unit.name: from_matrix(v.unit, planner.decode(state, v.unit.name)) for v in planner.vectors}
    return base, rest


def _golf(job: Job, options: Options, found: Statistics, store: Store, key: str) -> tuple[GolfBase, dict[str, Array]]:
    """The golf base; all other units keep their values."""
    planner = prepare(job, options, found).planner
    ones = dict.fromkeys(planner.names, 1.0)
    problems = {p.unit.name: problem_of(p) for p in planner.matrices}
    tables = frozenset(job.model.embeddings())
    kept = store.get(digest(key, "k"))
    if kept is None:
        blank = {}
        for u in job.model.units:
            values = as_matrix(u, job.model.tensor(u).detach().float().cpu().numpy())
            blank[u.name] = Section(3, b"" if u.name in problems else EXACT.encode(values, u.dtype))
        room = job.budget - job.size(blank, b"") - 3 * len(problems)
        if room <= 0:
            raise BudgetError(f"golf needs {job.budget - room:,} bytes without any matrix", job.budget - room)
        with job.reporter.step("search", 1):
            k = golf_k(problems, tables, room)
            kept = {"k": k, "kappa": _factors(job, GolfBase.of(problems, tables, k, ones))}
        store.put(digest(key, "k"), kept)
    return GolfBase.of(problems, tables, kept["k"], kept["kappa"]), {}


def _factors(job: Job, base: Base) -> dict[str, float]:
    """Correction factor of every unit of a base, one role at a time; see `bytecap.allocation.correction`."""
    roles: dict[str, list[str]] = {}
    for name in base.problems:
        roles.setdefault(role_name(name), []).append(name)
    values = {
        role: {n: from_matrix(base.problems[n].unit, base.units[n].values.numpy()) for n in names}
        for role, names in roles.items()
    }
    module = job.model.module
    measured = kl_each(module, copy_of(module), values, leading(job.sets.correction, TOKENS), device=job.device)
    found: dict[str, Factor] = {}
    for role, names in roles.items():
        predicted = sum(base.problems[n].distortion(base.units[n].values) for n in names)
        found |= dict.fromkeys(names, Factor.of(measured[role], predicted))
    return shrunk(found)
