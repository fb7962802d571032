"""Prepare a model for planning: factor Hessians, pair vectors with gradients, and code the rest exactly.

Units that a budget is spread over are the planner's; all others (integers, buffers, empty tensors) are coded exactly
here, and their bytes are taken off before anything is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.allocation.differences import over
from bytecap.allocation.planner import FloatArray, Planner, State, VectorUnit
from bytecap.allocation.unused import even_experts, keep_unused
from bytecap.calibration import metric as sensitivity
from bytecap.calibration.metric import Metric
from bytecap.calibration.probe import Statistics
from bytecap.format.coders.base import CODER as BASE
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.job import Job, Section
from bytecap.model.checkpoint import as_matrix
from bytecap.progress import warn
from bytecap.quantization.quantizer import Options, Prepared, prepare
from bytecap.quantization.rules import Rules, initial_rules
from bytecap.system import allocator
from bytecap.types import Unit

TABLES_GUESS = 700  # bytes of the tables section before it exists


@dataclass(frozen=True)
class PreparedModel:
    """A job's model, ready to be planned.

    Attributes:
        planner: the units that are planned.
        fixed: sections of all others.
        capacity: bytes that the planned units may use.
        rules: tables and offsets that the first settling starts from.
        unused: bytes of fixed units that no gradient reaches, by name.
        targets: whether targets that follow the coded prefix were kept, and KL and bytes' worth with and without them.
    """

    planner: Planner
    fixed: Mapping[str, Section]
    capacity: float
    rules: Rules
    unused: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)

    def emptied(self) -> PreparedModel:
        """Return the model without the arrays that only rounding needs."""
        return replace(self, planner=self.planner.emptied())

    def measure_finest(self) -> tuple[PreparedModel, State]:
        """Settle the finest grids; returns them and the model with their rules, for plans of large budgets."""
        state = self.planner.finest_state(self.rules)
        return replace(self, rules=state.rules), state.holding(())


def prepare_model(job: Job, options: Options, found: Statistics) -> PreparedModel:
    """Factor the Hessians of matrices, collect vectors, and code the other units exactly.

    Args:
        job: model and budget.
        options: ingredients.
        found: statistics of the job's tokens; used up, entry by entry, as factors take their place in memory.
    """
    model = job.model
    matrices, vectors, fixed = [], [], {}
    buffers = dict(model.module.named_buffers(remove_duplicate=False))
    with allocator.no_holes(), job.reporter.step("factorisation", len(model.units)) as advance:
        for u in model.units:
            values = model.tensor(u).detach()
            if job.base is not None and job.base.has(u, as_matrix(u, values.cpu().numpy())):
                found.uses.pop(u.name, None)
                fixed[u.name] = Section(BASE.tag, b"")
            elif u.name in found.uses and min(u.matrix_shape) > 1:
                uses = found.uses.pop(u.name)
                metric, unseen = even_experts(u, uses, sensitivity.join(uses, found.tokens))
                if unseen:
                    warn(job.reporter, f"no token reaches {unseen} experts of {u.name}: weighed like the others")
                matrices.append(_matrix(job, u, as_matrix(u, values), metric, options))
            elif values.is_floating_point() and values.numel() and u.name not in buffers:
                vectors.append(_vector(job, u, values.float().cpu().numpy(), sensitivity.diagonal(u, found)))
            else:
                fixed[u.name] = Section(EXACT.tag, EXACT.encode(as_matrix(u, values.cpu().numpy()), u.dtype))
            advance(1)
    kept = keep_unused(job, matrices, vectors)
    matrices = [p for p in matrices if p.unit.name not in kept]
    vectors = [v for v in vectors if v.unit.name not in kept]
    found.uses.clear()
    allocator.release()
    planner, fixed = Planner.of(matrices, vectors, options), fixed | kept
    unused = {n: len(s.data) for n, s in kept.items()}
    return PreparedModel(planner, fixed, _capacity(job, planner, fixed), initial_rules(options), unused)


def _matrix(job: Job, unit: Unit, values: Tensor, metric: Metric, options: Options) -> Prepared:
    """A matrix (rows, cols) as it is, or its difference to the base."""
    if job.base is None:
        return prepare(unit, values, metric, options)
    below = np.ascontiguousarray(job.base.matrix(unit), np.float32)
    gained = values.float() - torch.from_numpy(below).to(values.device)
    return over(prepare(unit, gained, metric, options), below)


def _vector(job: Job, unit: Unit, values: FloatArray, fisher: npt.NDArray[np.float64]) -> VectorUnit:
    """A unit without input statistics as it is, or its difference to the base."""
    if job.base is None:
        return VectorUnit(unit, values, fisher)
    below = np.ascontiguousarray(job.base.matrix(unit), np.float32)
    return VectorUnit(unit, as_matrix(unit, values) - below, as_matrix(unit, fisher), below)


def _capacity(job: Job, planner: Planner, fixed: Mapping[str, Section]) -> float:
    """Bytes left for planned units."""
    if job.base is not None:  # planned units may cost nothing, and those that do not count their place in the index
        blank = dict.fromkeys(planner.names, Section(BASE.tag, b"")) | dict(fixed)
        return job.budget - job.size(blank, bytes(min(TABLES_GUESS, job.budget // 20)))
    blank = {n: Section(1, b"") for n in planner.names} | dict(fixed)
    lengths = 2 * len(planner.names)  # longer lengths in the directory
    lanes = 2.2 * sum(p.unit.parameters for p in planner.matrices) / 8192  # a lane's state beyond its content
    return job.budget - job.size(blank, bytes(TABLES_GUESS)) - lengths - lanes
