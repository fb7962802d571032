"""Round prepared matrices at given steps to integers, and measure their bytes and distortion.

Equally shaped units are rounded together. Rates here are code lengths under the shared tables plus every byte
of side information; the allocator works with them, the writer serialises for real.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.calibration.metric import Metric, factor
from bytecap.calibration.triangle import Triangle
from bytecap.format.coders import Shared
from bytecap.format.coders.classes import CENTRES, CLASSES, UNIT_CLASS
from bytecap.format.coders.grid import GridCode, side_bits
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.entropy.shared_tables import Counts
from bytecap.quantization import Rounded, RoundingProblem, Shrink, row_classes
from bytecap.quantization.ahead import Ahead, of_one_shape
from bytecap.quantization.counted import counted, counted_there
from bytecap.quantization.options import Options
from bytecap.quantization.scalar import round_scalar
from bytecap.quantization.symbols_there import GridCodeThere, symbols_anywhere
from bytecap.quantization.trellis import round_trellis
from bytecap.system.ranks import ALONE, Ranks, owners
from bytecap.system.slabs import slabs
from bytecap.system.threads import in_threads
from bytecap.types import Unit

FIRST_DEPENDENT = UNIT_CLASS - 3  # columns of less spread than 0.6 steps gain nothing from a trellis
ON_BASE = 26  # bytes of a difference beside its section: stack and layer (7), directory (6), and about as many of index
_BATCH_VALUES = 4 * 2**20  # weights and Hessian factors rounded together on a processor
_BYTES_A_VALUE = 256  # of a GPU's memory to each of them there
_A_WEIGHT, _AN_ENTRY = 8, 4  # bytes of a GPU's memory to a weight and to a Hessian entry, while a batch is rounded

_A_COLUMN = 256  # products of feedback that walking a weight along the trellis takes as long as


@dataclass(frozen=True)
class Prepared:
    """A matrix unit ready for rounding: one row of a `RoundingProblem`.

    Attributes:
        unit: the unit.
        weight: (rows, cols) float32, to be approximated.
        rows: (rows,), weight of each row's error.
        row_step: (rows,), quarter octaves.
        lower: Cholesky factor (cols, cols), columns in rounding order.
        order: (cols,), stored index of each column.
        hessian: (cols, cols), damped, where `lower` says less than that (no error feedback).
    """

    unit: Unit
    weight: Tensor
    rows: Tensor
    row_step: Tensor
    lower: Triangle
    order: Tensor
    hessian: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of what is rounded."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it is rounded."""
        return self.order.device

    @property
    def target(self) -> Tensor:
        """Return the values (rows, cols) that the decoded unit is to approximate."""
        return self.weight

    def slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weights some rows at a time, with the slice of rows that they are."""
        weight = self.weight
        for part in slabs(*self.shape):
            yield part, weight[part]

    def times(self, matrix: Tensor) -> Tensor:
        """Return the target times a matrix (cols, cols)."""
        target = self.target
        return product(self.shape, ((part, target[part]) for part in slabs(*self.shape)), matrix)

    def moved(self, change: Tensor) -> Prepared:
        """Return the unit with `change` (rows, cols) added to its target."""
        return replace(self, weight=self.weight + change)

    def scaled(self, coded: Coded) -> Coded:
        """Return the rounded rows as they count for the whole unit, where they are a sample."""
        return coded

    def sparse(self, step: float, shrink: Shrink, shared: Shared) -> Sparse | None:
        """Return the unit rounded by descent, where it has few bits a weight; None where feedback rounds it."""
        del step, shrink, shared
        return None

    def complete(self, coded: Coded, shared: Shared) -> Coded:
        """Return the rounded unit, with an overlay where it has one (`bytecap.allocation.overlaid`)."""
        del shared
        return coded

    def emptied(self) -> Prepared:
        """Return the unit without the arrays that only rounding needs."""
        none = torch.zeros(0, device=self.order.device)  # which still says where the unit is
        return replace(self, weight=none, rows=none, lower=Triangle(none, 0), order=none, hessian=None)


def product(shape: tuple[int, int], parts: Iterable[tuple[slice, Tensor]], matrix: Tensor) -> Tensor:
    """Return a matrix of a shape, given some rows at a time, times another one."""
    out = torch.empty(shape, device=matrix.device)
    for part, rows in parts:
        torch.matmul(rows, matrix, out=out[part])
    return out


@dataclass(frozen=True)
class Coded:
    """A matrix unit rounded at one step.

    Attributes:
        code: integers and side information as they would be stored.
        distortion: predicted, in nats per token.
        counts: histogram of |z| by class, shape (2, 64, up to MAX_HALF + 2): of scalar and of dependent columns.
        overlay: tag and bytes of an overlay over it, or None.
        below: (rows, cols), values of the base of an update, to which these are a difference; None without.
        owner: the rank that alone has the symbols, where ranks have shared the rounding; None where all have them.
    """

    code: GridCode
    distortion: float
    counts: Counts
    overlay: tuple[int, bytes] | None = None
    below: npt.NDArray[np.float32] | None = None
    owner: int | None = None

    def owned(self, rank: int | None) -> Coded:
        """Return the unit as one whose symbols only this rank has, or all."""
        found = copy(self)
        object.__setattr__(found, "owner", rank)
        return found

    def at_step(self, step: float) -> Coded:
        """Return the unit with the same integers at another step."""
        found, code = copy(self), copy(self.code)
        object.__setattr__(code, "step", float(np.float32(step)))
        object.__setattr__(found, "code", code)
        return found

    @property
    def as_in_base(self) -> bool:
        """Whether nothing is added to the base, so that nothing is stored."""
        return self.below is not None and self.overlay is None and not bool(symbols_anywhere(self.code).any())


Sparse = tuple[Coded, npt.NDArray[np.float64]]
"""A unit rounded by descent, and its centroids' sums."""

_Batch = tuple[list[Coded], npt.NDArray[np.float64]]  # units rounded together, and their centroids' sums


def prepare(unit: Unit, weight: Tensor, metric: Metric, options: Options) -> Prepared:
    """Factor the Hessian and fix the row steps of a unit; the weights (rows, cols) are only held."""
    whole = None
    if not options.feedback:
        whole = metric.hessian.clone()
        whole.diagonal().add_(max(options.damping * float(whole.diagonal().mean()), 1e-30))
        metric = replace(metric, hessian=torch.diag(metric.hessian.diagonal()))
    lower, order = factor(metric, options.damping, options.order)
    energy = metric.rows.clamp(min=1e-9)
    exponent = -2 * options.row_power * torch.log2(energy)
    exponent = exponent - exponent.mean()
    step = torch.round(exponent / options.row_quantum) * options.row_quantum
    return Prepared(unit, weight.float(), metric.rows, step.clamp(-60, 60).to(torch.int32), lower, order, whole)


def round_units(
    items: Sequence[Prepared],
    steps: Mapping[str, float],
    shrink: Shrink,
    options: Options,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[Coded], Coded] = lambda coded: coded,
    ranks: Ranks = ALONE,
    shared: Shared | None = None,
) -> tuple[dict[str, Coded], npt.NDArray[np.float64]]:
    """Round units at their steps.

    Args:
        items: the units.
        steps: of every unit.
        shrink: reconstruction rules.
        options: ingredients.
        progress: called with the number of weights rounded.
        keep: given every unit as soon as it is rounded, returns what is held of it.
        ranks: processes that share the work, whole batches each.
        shared: tables that price symbols, for units that may be rounded by descent.

    Returns:
        Coded units by name, and summed centroid statistics (2, 64, CENTRES).
    """
    device = items[0].device if items else torch.device("cpu")
    batches = of_one_shape(items, lambda item: item.shape, _together(device))

    def begin(number: int) -> Callable[[], _Begun]:
        return _begin(batches[number], steps, shrink, options, shared)

    def work(number: int) -> _Batch:
        batch = batches[number]
        with ahead.taken(number) as begun:
            found = begun.collected(steps, options)
            kept = [keep(x) for x in found]
        if progress is not None:
            progress(sum(p.shape[0] * p.shape[1] for p in batch))
        return kept, begun.centres

    costs = [float(len(b) * b[0].shape[0] * b[0].shape[1] * (b[0].shape[1] + _A_COLUMN)) for b in batches]
    if len(batches) == 1:
        ranks = ALONE  # sending takes longer than doing it everywhere
    ranked = owners(costs, ranks.size)
    ahead = Ahead(
        begin, [i for i, rank in enumerate(ranked) if rank == ranks.rank or ranks.size == 1],
        [len(b) * (_A_WEIGHT * rows + _AN_ENTRY * cols) * cols for b in batches for rows, cols in [b[0].shape]], device,
    )  # fmt: skip
    coded: dict[str, Coded] = {}
    centres = np.zeros((2, 64, 17))
    done = zip(batches, ranks.each(costs, work, sent=_sent, read=_read), ranked, strict=True)
    for batch, (found, own), rank in done:
        there = found if ranks.size == 1 else [x.owned(rank) for x in found]
        coded |= {p.unit.name: x for p, x in zip(batch, there, strict=True)}
        centres += own
    return {item.unit.name: coded[item.unit.name] for item in items}, centres


def _sent(found: _Batch) -> Any:
    """Return a rounded batch as ranks send it: without symbols, which few steps ask for."""
    names = [f.name for f in fields(GridCode) if f.name != "symbols"]
    return [[[c.distortion, c.counts, {n: getattr(c.code, n) for n in names}] for c in found[0]], found[1]]


def _read(value: Any) -> _Batch:
    """Read what `_sent` returned."""
    units = []
    for distortion, counts, code in value[0]:
        none = np.zeros((0, code["column_step"].shape[1]), np.int8)
        units.append(Coded(GridCode(symbols=none, **code), distortion, counts))
    return units, value[1]


def _together(device: torch.device) -> int:
    """Return the number of weights and Hessian entries that are rounded together."""
    if device.type != "cuda":
        return _BATCH_VALUES
    return min(2**28, torch.cuda.get_device_properties(device).total_memory // _BYTES_A_VALUE)


@cache
def _has_programs() -> bool:
    """Return whether there is a triton that knows what the programs are written with: 3.2 and later, torch 2.6."""
    if importlib.util.find_spec("triton") is None:
        return False
    return hasattr(importlib.import_module("triton.language"), "gather")


@cache
def _trellis(device: str) -> Callable[..., Callable[[], Rounded]]:
    """Return the function that begins to round along the trellis on a kind of device."""
    if device == "cuda" and _has_programs():
        from bytecap.quantization import cuda as there

        return there.begin_trellis
    return lambda *args, **more: partial(round_trellis, *args, **more)


def compile_ahead(options: Options, device: str) -> None:
    """Begin to compile what rounds on a GPU, where it is compiled, while statistics are collected."""
    target = torch.device(device)
    if options.trellis and target.type == "cuda" and _has_programs():
        from bytecap.quantization import cuda as there

        there.compile_ahead(options.memory, target)


@dataclass(frozen=True)
class _Begun:
    """A batch that is being rounded.

    Attributes:
        few: units rounded by descent, by their place in the batch.
        rest: the others.
        rounded: those.
    """

    few: Mapping[int, Sparse]
    rest: Sequence[Prepared]
    rounded: Rounded | None

    def collected(self, steps: Mapping[str, float], options: Options) -> Iterator[Coded]:
        """Yield all units as they would be stored."""
        rounded, rest, few = self.rounded, self.rest, self.few

        def collect(i: int) -> Coded:
            assert rounded is not None  # noqa: S101 (it is where there is a rest)
            return _collect(rest[i], i, steps, rounded, options)

        numbers = range(len(rest))
        there = rounded is not None and rounded.on_device
        others = iter(map(collect, numbers) if there else in_threads(collect, numbers))
        for i in range(len(rest) + len(few)):
            yield few[i][0] if i in few else next(others)

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """See `Rounded`."""
        none = np.zeros((2, CLASSES, CENTRES)) if self.rounded is None else self.rounded.centres
        return sum((centres for _, centres in self.few.values()), none)


def _begin(
    batch: Sequence[Prepared], steps: Mapping[str, float], shrink: Shrink, options: Options, shared: Shared | None
) -> Callable[[], _Begun]:
    """Round those units of a batch by descent that are to be, and begin to round the others."""
    few: dict[int, Sparse] = {}
    if shared is not None:
        tables = shared
        found = in_threads(lambda p: p.sparse(steps[p.unit.name], shrink, tables), batch)
        few = {i: s for i, s in enumerate(found) if s is not None}
    rest = [p for i, p in enumerate(batch) if i not in few]
    waiting = _begin_batch(rest, steps, shrink, options) if rest else None
    return lambda: _Begun(few, rest, None if waiting is None else waiting())


def _begin_batch(
    items: Sequence[Prepared], steps: Mapping[str, float], shrink: Shrink, options: Options
) -> Callable[[], Rounded]:
    """Begin to round equally shaped units together; returns what waits for the result."""
    first = items[0]
    weight = torch.empty(len(items), *reversed(first.shape), device=first.device)
    rows = []
    for i, item in enumerate(items):
        row_step, order = torch.exp2(item.row_step.float() / 4), item.order
        for part, values in item.slabs():
            weight[i, :, part] = (values / row_step[part, None]).T[order]
        rows.append(item.rows.float() * row_step.square())
    lower = torch.stack([item.lower.whole() for item in items]) if len(items) > 1 else first.lower.whole()[None]
    order = torch.stack([item.order for item in items])
    step = torch.tensor([steps[item.unit.name] for item in items], dtype=torch.float32, device=weight.device)
    classes = row_classes(weight, lower, step, options.row_class)
    problem = RoundingProblem(weight, lower, order, torch.stack(rows), classes)
    del weight  # which becomes the errors
    if options.trellis:
        return _trellis(first.device.type)(
            problem, step, shrink, FIRST_DEPENDENT, options.memory, waterfill=options.waterfill
        )
    return partial(round_scalar, problem, step, shrink, waterfill=options.waterfill)


def _collect(item: Prepared, i: int, steps: Mapping[str, float], rounded: Rounded, options: Options) -> Coded:
    """Return unit `i` of a rounded batch as it would be stored."""
    column, row = rounded.column_class[i], rounded.row_class[i]
    first = FIRST_DEPENDENT if options.trellis else CLASSES
    symbols: Any = rounded.symbols[i]
    symbols, counts = (counted_there if rounded.on_device else counted)(symbols, column, row, first)
    code = (GridCodeThere if rounded.on_device else GridCode)(
        step=float(np.float32(steps[item.unit.name])), symbols=symbols, column_step=rounded.column_step[i][None],
        column_class=column[None], row_step=item.row_step.cpu().numpy(), row_class=row, first=first,
        memory=options.memory,
    )  # fmt: skip
    return Coded(code, float(rounded.distortion[i]), counts)


def rate(coded: Coded, shared: Shared) -> float:
    """Estimate the bytes of a unit's section: payload code length, side information, header and overlay."""
    if coded.as_in_base:
        return 0.0
    bits = side_bits(coded.code, shared.tables)
    for number, counts in enumerate(coded.counts):
        seen = counts > 0
        if seen.any():  # tables are split for dependent columns only
            cost = shared.tables.split_cost if number else shared.tables.cost_by_size
            bits += float(counts[seen] @ cost[:, : counts.shape[1]][seen])
    if coded.below is not None:
        bits += 8 * ON_BASE
    return bits / 8 + (STACK.growth(bits / 8, coded.overlay[1]) if coded.overlay else 0)
