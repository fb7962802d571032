"""Prepare a model for planning: factor Hessians, pair vectors with gradients, and code the rest exactly.

Units that a budget is spread over are the planner's; all others (integers, buffers, empty tensors) are coded exactly
here, and their bytes are taken off before anything is planned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.allocation.differences import is_sparse, over
from bytecap.allocation.planner import Planner, State, finest_step
from bytecap.allocation.shared_matrices import shared_factor, shared_matrices
from bytecap.allocation.unused import even_experts, keep_unused
from bytecap.allocation.vector_unit import FloatArray, VectorUnit
from bytecap.calibration import finite
from bytecap.calibration import metric as sensitivity
from bytecap.calibration.collectors import Use
from bytecap.calibration.metric import Metric
from bytecap.calibration.streamed import probe_streamed
from bytecap.calibration.sums import Statistics
from bytecap.format.coders.base import CODER as BASE
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.job import Job, Section
from bytecap.job.section import StoredSection
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.progress import Advance, warn
from bytecap.quantization.options import Options
from bytecap.quantization.quantizer import Prepared, prepare
from bytecap.quantization.rules import Rules, initial_rules
from bytecap.quantization.stored import HeldSample, Sample, StoredPrepared, keeper
from bytecap.system import allocator
from bytecap.system.scratch import Scratch
from bytecap.types import Unit, as_matrix

TABLES_GUESS = 700  # bytes of the tables section before it exists
_LARGE = 2**28  # parameters from which a model is rounded as rarely as can be; smaller ones keep their bytes


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
        with_targets: makes the planner with the targets of all units, where it has only those of the last ones.
    """

    planner: Planner
    fixed: Mapping[str, Section]
    capacity: float
    rules: Rules
    unused: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    with_targets: Callable[[], Planner] | None = None

    @property
    def large(self) -> bool:
        """Whether rounding all units takes so long that it is done as rarely as can be."""
        return self.planner.parameters >= _LARGE

    def with_sample(self) -> PreparedModel:
        """Return the model with samples of the rows of its units, to search on, if it is large."""
        if not self.large:
            return self
        few = [_sampled(p) for p in self.planner.matrices]
        return replace(self, planner=replace(self.planner, sample=replace(self.planner, matrices=few)))

    def emptied(self) -> PreparedModel:
        """Return the model without the arrays that only rounding needs."""
        return replace(self, planner=self.planner.emptied(), with_targets=None)

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

    def matrix(u: Unit) -> Prepared | None:
        uses = found.uses.pop(u.name, None)
        return None if uses is None else _factored(job, u, uses, found.tokens, options)

    with allocator.no_holes(), job.reporter.step("factorisation", len(job.model.units)) as advance:
        if found.owner:
            kept = shared_matrices(job, found.owner, matrix)
            ready = _assembled(job, options, found, lambda u: kept.pop(u.name, None), advance)
        else:
            ready = _assembled(job, options, found, matrix, advance)
    found.uses.clear()
    allocator.release()
    return ready if job.paths else ready.with_sample()  # overlays are tried on whole units


def prepare_streamed(job: Job, model: StreamedModel, options: Options) -> PreparedModel:
    """Do what `prepare_model` does for a streamed model: its units are factored as their statistics are completed.

    Args:
        job: budget and tokens.
        model: the job's model.
        options: ingredients.
    """
    units, windows = {u.name: u for u in model.units}, job.sets.statistics
    tokens = sum(w.predicted for w in windows)
    stored: dict[str, Prepared] = {}
    finest: dict[str, float] = {}
    waiting: dict[str, Prepared | None] = {}  # for all ranks to get them

    def factored(name: str, uses: list[Use]) -> None:
        finite.check_uses(name, uses)
        metric = _metric(job, units[name], uses, tokens)
        none = torch.zeros(0, device=job.device)
        waiting[name] = None if metric is None else prepare(units[name], none, metric, options)
        if job.ranks.size == 1:
            share({name: 0})

    def share(owner: Mapping[str, int]) -> None:
        for name, source in owner.items():
            ready = waiting.pop(name, None)
            ready = shared_factor(job, units[name], ready, source, lambda: torch.zeros(0, device=job.device))
            if ready is not None:
                stored[name] = StoredPrepared(ready, model.scratch, partial(model.matrix, units[name]))
                finest[name] = finest_step(stored[name])

    with allocator.no_holes(), job.reporter.step("statistics and factorisation", tokens) as advance:
        found = probe_streamed(
            model.streamed, model.units, windows, sink=factored, scratch=model.scratch, seed=job.seed,
            guided=options.guided, progress=advance, note=job.reporter.note, ranks=job.ranks, share=share,
        )  # fmt: skip
    allocator.release()
    ready = _assembled(job, options, found, lambda u: stored.get(u.name), lambda _: None, finest)
    planner = replace(ready.planner, keep=keeper(model.scratch), keep_section=partial(_kept, model.scratch))
    return replace(ready, planner=planner).with_sample()


def _sampled(item: Prepared) -> Prepared:
    """Return a sample of a unit's rows, the unit itself where it has few or is not rounded row by row."""
    if isinstance(item, StoredPrepared):
        return Sample.of(item)
    return HeldSample.of(item) if type(item) is Prepared else item


def _kept(scratch: Scratch, section: Section) -> Section:
    found = scratch.put_bytes(section.data)
    return StoredSection(section.tag, found.length, found.read)


def _factored(job: Job, unit: Unit, uses: list[Use], tokens: int, options: Options) -> Prepared | None:
    """A matrix with its factor; None for a unit that is no matrix."""
    metric = _metric(job, unit, uses, tokens)
    if metric is None:
        return None
    return _matrix(job, unit, as_matrix(unit, job.model.tensor(unit).detach()), metric, options)


def _metric(job: Job, unit: Unit, uses: list[Use], tokens: int) -> Metric | None:
    """The metric of a matrix, which takes the place of its uses; None for a unit that is no matrix."""
    if min(unit.matrix_shape) <= 1:
        return None
    metric, unseen = even_experts(unit, uses, sensitivity.join(uses, tokens))
    uses.clear()
    if unseen:
        warn(job.reporter, f"no token reaches {unseen} experts of {unit.name}: weighed like the others")
    return metric


def _assembled(
    job: Job,
    options: Options,
    found: Statistics,
    matrix: Callable[[Unit], Prepared | None],
    advance: Advance,
    finest: Mapping[str, float] | None = None,
) -> PreparedModel:
    """All units in the roles they have in planning.

    Args:
        job: model and budget.
        options: ingredients.
        found: for vectors.
        matrix: gives a unit's factor, or None if it has none.
        advance: called for every unit.
        finest: finest steps of matrices, where they are known.
    """
    matrices, vectors, fixed = [], [], {}
    buffers = dict(job.model.module.named_buffers(remove_duplicate=False))
    for u in job.model.units:
        if job.base is not None and job.base.has(u, as_matrix(u, job.model.tensor(u).detach().cpu().numpy())):
            found.uses.pop(u.name, None)
            fixed[u.name] = Section(BASE.tag, b"")
        elif (ready := matrix(u)) is not None:
            matrices.append(ready)
        else:
            values = job.model.tensor(u).detach()
            if values.is_floating_point() and values.numel() and u.name not in buffers:
                vectors.append(_vector(job, u, values.float().cpu().numpy(), sensitivity.diagonal(u, found)))
            else:
                fixed[u.name] = Section(EXACT.tag, EXACT.encode(as_matrix(u, values.cpu().numpy()), u.dtype))
        advance(1)
    kept = keep_unused(job, matrices, vectors)
    matrices = [p for p in matrices if p.unit.name not in kept]
    vectors = [v for v in vectors if v.unit.name not in kept]
    planner, fixed = Planner.of(matrices, vectors, options, finest, job.ranks), fixed | kept
    unused = {n: len(s.data) for n, s in kept.items()}
    sparse = job.base is not None and is_sparse(job.budget, job.model.parameters)
    rules = initial_rules(options, descent=sparse)
    return PreparedModel(planner, fixed, _capacity(job, planner, fixed), rules, unused)


def _matrix(job: Job, unit: Unit, values: Tensor, metric: Metric, options: Options) -> Prepared:
    """A matrix (rows, cols) as it is, or its difference to the base."""
    if job.base is None:
        return prepare(unit, values, metric, options)
    below = np.ascontiguousarray(job.base.matrix(unit), np.float32)
    gained = values.float() - torch.from_numpy(below).to(values.device)
    sparse = is_sparse(job.budget, job.model.parameters)
    return over(prepare(unit, gained, metric, options), below, descent=sparse)


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
