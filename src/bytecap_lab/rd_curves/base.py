"""The ground that exception paths are measured on: every matrix of a model at a budget's operating point.

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

from bytecap.allocation.layered import problem_of
from bytecap.allocation.planner import Planner, coder_of, decode_grid, finest_step
from bytecap.calibration.metric import Metric
from bytecap.format.coders import Shared
from bytecap.format.coders.packed import BROTLI, dequantize
from bytecap.format.coders.packed import CODER as PACKED
from bytecap.format.entropy.rans import encode_all
from bytecap.job import Section
from bytecap.methods.baselines.golf import (
    EMBEDDING_LEVELS,
    K_EMBEDDING,
    Factor,
    K,
    Search,
    entropy_bytes,
    factorize,
    gptq,
    round_nearest,
    row_steps,
)
from bytecap.quantization.overlays import Problem
from bytecap.quantization.quantizer import Prepared, prepare, rate, round_units


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
    def problems(self) -> Mapping[str, Problem]:
        """By unit name."""
        ...

    @property
    def shared(self) -> Shared:
        """What decoding needs."""
        ...

    @property
    def kappa(self) -> Mapping[str, float]:
        """Correction factor of every unit's predicted distortion."""
        ...

    @property
    def units(self) -> Mapping[str, Rounded]:
        """Every unit at the operating point."""
        ...

    def round(self, problems: Sequence[Problem], finer: float) -> list[Rounded]:
        """Code problems at `2^-finer` times their units' steps."""
        ...

    def sections(self, rounded: Sequence[Rounded]) -> list[Section]:
        """Real sections."""
        ...


@dataclass
class GridBase:
    """See `Base`; the default method's grid under frozen tables and offsets."""

    planner: Planner
    steps: Mapping[str, float]
    kappa: Mapping[str, float]
    problems: Mapping[str, Problem] = field(init=False)
    units: Mapping[str, Rounded] = field(init=False)

    def __post_init__(self) -> None:
        self.problems = {p.unit.name: problem_of(p) for p in self.planner.matrices}
        self._device = self.planner.matrices[0].weight.device if self.planner.matrices else torch.device("cpu")
        found = self._round(self.planner.matrices, 0.0)
        self.units = dict(zip(self.problems, found, strict=True))

    @property
    def shared(self) -> Shared:
        """The planner's tables and offsets."""
        return self.planner.shared

    def _round(self, items: Sequence[Prepared], finer: float) -> list[Rounded]:
        steps = {p.unit.name: max(self.steps[p.unit.name] * 2.0**-finer, finest_step(p)) for p in items}
        coded, _ = round_units(items, steps, self.planner.shrink, self.planner.options)
        return [
            Rounded(
                c.code, torch.from_numpy(np.ascontiguousarray(decode_grid(c.code, self.shared))), rate(c, self.shared)
            )
            for c in (coded[p.unit.name] for p in items)
        ]

    def round(self, problems: Sequence[Problem], finer: float) -> list[Rounded]:
        """See `Base`; a unit's own problem at its own step is not coded again."""
        options = replace(self.planner.options, damping=0.0)  # the problem's Hessian is damped already
        changed = [p for p in problems if finer or p is not self.problems[p.unit.name]]
        items = [
            prepare(p.unit, p.weight.to(self._device), _metric(p, self._device), options)
            for p in changed
        ]  # fmt: skip
        found = {p.unit.name: r for p, r in zip(changed, self._round(items, finer), strict=True)}
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


def _metric(problem: Problem, device: torch.device) -> Metric:
    return Metric(problem.hessian[None].to(device), problem.rows.to(device))


@dataclass
class GolfBase:
    """See `Base`; GPTQ at `k`, embeddings to nearest, brotli."""

    problems: Mapping[str, Problem]
    embeddings: frozenset[str]
    k: float
    kappa: Mapping[str, float]
    shared: Shared = field(default_factory=Shared)
    units: Mapping[str, Rounded] = field(init=False)
    _factors: dict[str, Factor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = [self._code(p, 0.0) for p in self.problems.values()]
        self.units = dict(zip(self.problems, found, strict=True))

    def _factor(self, problem: Problem) -> Factor:
        name = problem.unit.name
        if problem is not self.problems[name]:
            return factorize(problem.hessian)
        if name not in self._factors:
            self._factors[name] = factorize(problem.hessian)
        return self._factors[name]

    def _code(self, problem: Problem, finer: float) -> Rounded:
        k = self.k * 2.0**-finer
        if problem.unit.name in self.embeddings:
            steps = row_steps(problem.weight, K_EMBEDDING * k / K, EMBEDDING_LEVELS)
            code = round_nearest(problem.weight, steps)
        else:
            code = gptq(problem.weight, self._factor(problem), row_steps(problem.weight, k))
        size = 1.01 * entropy_bytes(code.codes) + 1.4 * len(problem.weight) + 16
        return Rounded(code, torch.from_numpy(dequantize(code)), size)

    def round(self, problems: Sequence[Problem], finer: float) -> list[Rounded]:
        """See `Base`; a unit's own problem at its own step is not coded again."""
        return [
            self.units[p.unit.name] if not finer and p is self.problems[p.unit.name] else self._code(p, finer)
            for p in problems
        ]

    def sections(self, rounded: Sequence[Rounded]) -> list[Section]:
        """See `Base`."""
        return [Section(PACKED.tag, PACKED.encode(r.code, BROTLI)) for r in rounded]


def golf_k(problems: Mapping[str, Problem], embeddings: frozenset[str], room: float) -> float:
    """The `k` at which the matrices take a little less than `room` bytes, calibrated on real sizes once.

    Args:
        problems: by unit name.
        embeddings: names of units rounded to nearest.
        room: bytes for all of them.
    """
    weights = {n: p.weight for n, p in problems.items()}
    factors = {n: factorize(p.hessian) for n, p in problems.items() if n not in embeddings}
    search = Search(weights, factors, 1.0)
    k = search.solve(room, K)
    search.measure(k)
    return search.solve(0.998 * room, k)
