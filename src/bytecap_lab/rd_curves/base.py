"""Code every matrix of a model at a budget's operating point, the base that overlays are measured on.

`grid` is the default method's allocated plan before drift targets and trimming; `golf` is the per-row grid of the
records at the `k` that meets the budget, rounded with the same guided Hessians that predict every error here. Both
code a changed problem in a unit's place, at the unit's step or a finer one, which is all a path asks of its base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bytecap.allocation.decoded import coder_of, decode_grid
from bytecap.allocation.overlaid import problem_of
from bytecap.allocation.planner import Planner, finest_step
from bytecap.calibration.metric import Metric
from bytecap.format.coders import Shared
from bytecap.format.coders.packed import BROTLI, dequantize
from bytecap.format.coders.packed import CODER as PACKED
from bytecap.format.entropy.rans import encode_all
from bytecap.job import Section
from bytecap.methods.baselines.golf import (
    EMBEDDING_LEVELS,
    K_EMBEDDING,
    K,
    StepSearch,
    entropy_bytes,
    gptq,
    round_nearest,
    row_steps,
)
from bytecap.methods.baselines.gptq import Factor, factorize
from bytecap.quantization.overlays import UnitProblem
from bytecap.quantization.quantizer import Prepared, prepare, rate, round_units
from bytecap.quantization.rules import Rules
from bytecap.system.threads import in_threads


@dataclass(frozen=True)
class Rounded:
    """A problem as the base codes it.

    Attributes:
        code: what the base's coder serialises.
        values: float32 (rows, cols), exactly as a reader gives them.
        estimate: bytes of the section before it exists.
    """

    code: Any
    values: Tensor
    estimate: float


class Base(Protocol):
    """A settled coding of all matrices."""

    @property
    def problems(self) -> Mapping[str, UnitProblem]:
        """Problems by unit name."""
        ...

    @property
    def shared(self) -> Shared:
        """The shared data that decoding needs."""
        ...

    @property
    def kappa(self) -> Mapping[str, float]:
        """Correction factor of every unit's predicted distortion."""
        ...

    @property
    def units(self) -> Mapping[str, Rounded]:
        """Every unit at the operating point."""
        ...

    @property
    def device(self) -> str:
        """Where codewords and networks are computed."""
        ...

    @property
    def memo(self) -> dict[Any, Any]:
        """Results that recodings keep, so that none is computed twice: codewords, networks, sections."""
        ...

    def round(self, problems: Sequence[UnitProblem], finer: float) -> list[Rounded]:
        """Code problems at `2^-finer` times their units' steps."""
        ...

    def sections(self, rounded: Sequence[Rounded]) -> list[Section]:
        """Real sections."""
        ...


@dataclass(frozen=True)
class GridBase:
    """See `Base`; the default method's grid under frozen tables and offsets."""

    planner: Planner
    rules: Rules
    steps: Mapping[str, float]
    kappa: Mapping[str, float]
    problems: Mapping[str, UnitProblem]
    units: Mapping[str, Rounded]
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    device: str = "cpu"

    @staticmethod
    def of(planner: Planner, rules: Rules, steps: Mapping[str, float], kappa: Mapping[str, float]) -> GridBase:
        """All matrices of a planner at their steps."""
        problems = {p.unit.name: problem_of(p) for p in planner.matrices}
        units = dict(zip(problems, _grid_round(planner, rules, planner.matrices, steps), strict=True))
        return GridBase(planner, rules, steps, kappa, problems, units)

    @property
    def shared(self) -> Shared:
        """Its tables and offsets."""
        return self.rules.shared

    def with_states(self, states: int) -> GridBase:
        """Return the base with a trellis of so many states for what is coded from now on."""
        return replace(self, planner=replace(self.planner, options=replace(self.planner.options, states=states)))

    def round(self, problems: Sequence[UnitProblem], finer: float) -> list[Rounded]:
        """See `Base`; a unit's own problem at its own step is not coded again."""
        options = replace(self.planner.options, damping=0.0)  # the problem's Hessian is damped already
        device = self.planner.matrices[0].weight.device if self.planner.matrices else torch.device("cpu")
        changed = [p for p in problems if finer or p is not self.problems[p.unit.name]]
        own = {p.unit.name: p for p in self.planner.matrices}  # factored already
        items = [
            own[p.unit.name] if p is self.problems[p.unit.name]
            else prepare(p.unit, p.weight.to(device), _metric(p, device), options)
            for p in changed
        ]  # fmt: skip
        steps = {p.unit.name: self.steps[p.unit.name] * 2.0**-finer for p in items}
        rounded = _grid_round(self.planner, self.rules, items, steps)
        found = {p.unit.name: r for p, r in zip(changed, rounded, strict=True)}
        return [found.get(p.unit.name) or self.units[p.unit.name] for p in problems]

    def sections(self, rounded: Sequence[Rounded]) -> list[Section]:
        """See `Base`."""
        sources = [coder_of(r.code).sources(r.code, self.shared) for r in rounded]
        streams = iter(encode_all([s for group in sources for s in group]))
        mine = [[next(streams) for _ in group] for group in sources]
        return [
            Section(coder_of(r.code).tag, coder_of(r.code).assemble(r.code, self.shared, part).data)
            for r, part in zip(rounded, mine, strict=True)
        ]


def _grid_round(planner: Planner, rules: Rules, items: Sequence[Prepared], steps: Mapping[str, float]) -> list[Rounded]:
    """Units at their steps, or at the finest that serve."""
    served = {p.unit.name: max(steps[p.unit.name], finest_step(p)) for p in items}
    coded, _ = round_units(items, served, rules.shrink, planner.options)
    return [
        Rounded(
            c.code, torch.from_numpy(np.ascontiguousarray(decode_grid(c.code, rules.shared))), rate(c, rules.shared)
        )
        for c in (coded[p.unit.name] for p in items)
    ]


def _metric(problem: UnitProblem, device: torch.device) -> Metric:
    return Metric(problem.hessian.to(device), problem.rows.to(device))


@dataclass(frozen=True)
class GolfBase:
    """See `Base`; GPTQ at `k`, embeddings to nearest, brotli.

    Attributes:
        factors: of every unit's own Hessian, embeddings left out.
    """

    problems: Mapping[str, UnitProblem]
    embeddings: frozenset[str]
    k: float
    kappa: Mapping[str, float]
    units: Mapping[str, Rounded]
    factors: Mapping[str, Factor]
    shared: Shared = field(default_factory=Shared)
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    device: str = "cpu"

    @staticmethod
    def of(
        problems: Mapping[str, UnitProblem], embeddings: frozenset[str], k: float, kappa: Mapping[str, float]
    ) -> GolfBase:
        """All matrices at `k`."""
        factors = {n: factorize(p.hessian) for n, p in problems.items() if n not in embeddings}
        units = {n: _golf_round(p, factors.get(n), k) for n, p in problems.items()}
        return GolfBase(problems, embeddings, k, kappa, units, factors)

    def _code(self, problem: UnitProblem, finer: float) -> Rounded:
        name = problem.unit.name
        factor = None if name in self.embeddings else self.factors[name]
        if factor is not None and problem is not self.problems[name]:
            factor = factorize(problem.hessian)
        return _golf_round(problem, factor, self.k * 2.0**-finer)

    def round(self, problems: Sequence[UnitProblem], finer: float) -> list[Rounded]:
        """See `Base`; a unit's own problem at its own step is not coded again."""
        return [
            self.units[p.unit.name] if not finer and p is self.problems[p.unit.name] else self._code(p, finer)
            for p in problems
        ]

    def sections(self, rounded: Sequence[Rounded]) -> list[Section]:
        """See `Base`."""
        return in_threads(lambda r: Section(PACKED.tag, PACKED.encode(r.code, BROTLI)), rounded)


def _golf_round(problem: UnitProblem, factor: Factor | None, k: float) -> Rounded:
    """GPTQ at `k`; to nearest without a factor, as embeddings are."""
    if factor is None:
        code = round_nearest(problem.weight, row_steps(problem.weight, K_EMBEDDING * k / K, EMBEDDING_LEVELS))
    else:
        code = gptq(problem.weight, factor, row_steps(problem.weight, k))
    size = 1.01 * entropy_bytes(code.codes) + 1.4 * len(problem.weight) + 16
    return Rounded(code, torch.from_numpy(dequantize(code)), size)


def golf_k(problems: Mapping[str, UnitProblem], embeddings: frozenset[str], room: float) -> float:
    """The `k` at which the matrices take a little less than `room` bytes.

    Args:
        problems: by unit name.
        embeddings: names of units rounded to nearest.
        room: bytes for all of them.
    """
    weights = {n: p.weight for n, p in problems.items()}
    factors = {n: factorize(p.hessian) for n, p in problems.items() if n not in embeddings}
    search = StepSearch(weights, factors, 1.0)
    k = search.solve(room, K)
    search.measure(k)
    return search.solve(0.998 * room, k)
