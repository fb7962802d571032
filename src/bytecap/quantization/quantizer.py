"""Round prepared matrices at given steps to integers, and measure their bytes and distortion.

Equally shaped units are rounded together. Rates here are code lengths under the shared tables plus every byte
of side information; the allocator works with them, the writer serialises for real.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.calibration.metric import Metric, factor
from bytecap.calibration.triangle import Triangle
from bytecap.errors import UsageError
from bytecap.format.coders import Shared
from bytecap.format.coders.classes import CLASSES, OCTAVE, UNIT_CLASS
from bytecap.format.coders.grid import GridCode, side_bits
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.coders.trellis import MASKS
from bytecap.format.entropy.frequencies import MAX_HALF
from bytecap.format.entropy.kernels import store
from bytecap.format.entropy.shared_tables import Counts
from bytecap.quantization import Rounded, RoundingProblem, Shrink, row_classes
from bytecap.quantization.scalar import round_scalar
from bytecap.quantization.trellis import round_trellis
from bytecap.quantization.trial_values import classes_there
from bytecap.system.threads import in_threads
from bytecap.types import Unit

FIRST_DEPENDENT = UNIT_CLASS - 3  # columns of less spread than 0.6 steps gain nothing from a trellis
ON_BASE = 26  # bytes of a difference beside its section: stack and layer (7), directory (6), and about as many of index
STATES = tuple(1 << memory for memory in MASKS)
EFFORTS = (8, 32, 128, 256)  # states of the trellis by effort
_DEFAULT_EFFORT = {"cpu": 2, "cuda": 1}  # seconds over those of 8 states: 1.0 on a processor, 1.04 on an H200 (2: 1.23)
_BATCH_VALUES = 4 * 2**20  # weights and Hessian factors rounded together on a processor
_BYTES_A_VALUE = 256  # of a GPU's memory to each of them there, of which 16 are used

_WITHDRAWN = {"groups": "row groups of the Hessian cost more quality than they gain at equal bytes"}


def effort_on(device: str, effort: int | None) -> int:
    """Return the effort that is asked for, or the default of a torch device."""
    return _DEFAULT_EFFORT[torch.device(device).type] if effort is None else effort


@dataclass(frozen=True)
class Options:
    """Ingredients of the `grid` coder, each of which can be switched off.

    Attributes:
        feedback: error feedback and per-column steps from the Cholesky factor.
        waterfill: per-column steps; False gives one step per row with feedback, as GPTQ.
        order: round columns of large input energy first.
        row_power: row steps proportional to `G^(-row_power / 2)`; 0 switches them off.
        row_quantum: quarter octaves a row step is rounded to.
        row_class: quarter octaves a row's spread class is rounded to; 0 switches row classes off.
        trellis: walk columns of some spread along a trellis.
        states: of the trellis, see `STATES`; more take longer and distort less.
        shrink: reconstruct at centroids.
        damping: of the Hessian, in fractions of its mean diagonal.
        guided: weight tokens by output gradient energy.
        correct: measure correction factors with the real loss.
        allocate: choose steps on measured rate-distortion points; False gives every unit the same step.
        drift: most strength of drift targets, which tokens decide by which they were not made; 0 off.
        drift_tokens: tokens they are computed from.
    """

    feedback: bool = True
    waterfill: bool = True
    order: bool = True
    row_power: float = 1.0
    row_quantum: int = 2
    row_class: int = 1
    trellis: bool = True
    states: int = 8
    shrink: bool = True
    damping: float = 1e-3
    guided: bool = True
    correct: bool = True
    allocate: bool = True
    drift: float = 1.0
    drift_tokens: int = 16_384

    @property
    def memory(self) -> int:
        """Bits of a trellis' state."""
        return self.states.bit_length() - 1

    @staticmethod
    def of(given: Mapping[str, Any], warn: Callable[[str], None] = lambda _: None, effort: int = 0) -> Options:
        """Read the options of a job.

        Args:
            given: options by name.
            warn: told about options that no longer do anything.
            effort: 0 to 3, says how many states the trellis has where the options do not.

        Raises:
            UsageError: an unknown option, or a number of states that there is no trellis of.
        """
        known = [f.name for f in fields(Options)]
        unknown = sorted(set(given) - set(known) - set(_WITHDRAWN))
        if unknown:
            raise UsageError(f"method bytecap has no option {unknown[0]!r} ({', '.join(known)})")
        for name in sorted(set(given) & set(_WITHDRAWN)):
            warn(f"the option {name} of method bytecap does nothing any more: {_WITHDRAWN[name]}")
        options = Options(**{"states": EFFORTS[effort], **{n: v for n, v in given.items() if n in known}})
        if options.states not in STATES:
            raise UsageError(f"there is no trellis of {options.states} states ({', '.join(map(str, STATES))})")
        return options


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

    def moved(self, change: Tensor) -> Prepared:
        """Return the unit with `change` (rows, cols) added to its target."""
        return replace(self, weight=self.weight + change)

    def scaled(self, coded: Coded) -> Coded:
        """What was rounded as it counts for the whole unit, where it is a sample of its rows."""
        return coded

    def complete(self, coded: Coded, shared: Shared) -> Coded:
        """Return the rounded unit, with an overlay where it has one (`bytecap.allocation.overlaid`)."""
        del shared
        return coded

    def emptied(self) -> Prepared:
        """Return the unit without the arrays that only rounding needs."""
        none = torch.zeros(0, device=self.order.device)  # which still says where the unit is
        return replace(self, weight=none, rows=none, lower=Triangle(none, 0), order=none, hessian=None)


@dataclass(frozen=True)
class Coded:
    """A matrix unit rounded at one step.

    Attributes:
        code: integers and side information as they would be stored.
        distortion: predicted, in nats per token.
        counts: histogram of |z| by class, shape (2, 64, up to MAX_HALF + 2): of scalar and of dependent columns.
        overlay: tag and bytes of an overlay over it, or None.
        below: (rows, cols), values of the base of an update, to which these are a difference; None without.
    """

    code: GridCode
    distortion: float
    counts: Counts
    overlay: tuple[int, bytes] | None = None
    below: npt.NDArray[np.float32] | None = None

    @property
    def as_in_base(self) -> bool:
        """Whether nothing is added to the base, so that nothing is stored."""
        return self.below is not None and self.overlay is None and not self.code.symbols.any()


def prepare(unit: Unit, weight: Tensor, metric: Metric, options: Options) -> Prepared:
    """Factor the Hessian and fix the row steps of a unit."""
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
) -> tuple[dict[str, Coded], npt.NDArray[np.float64]]:
    """Round units at their steps.

    Args:
        items: the units.
        steps: of every unit.
        shrink: reconstruction rules.
        options: ingredients.
        progress: called with the number of weights rounded.
        keep: given every unit as soon as it is rounded, returns what is held of it.

    Returns:
        Coded units by name, and summed centroid statistics (2, 64, CENTRES).
    """
    alike: dict[tuple[int, int], list[Prepared]] = {}
    for item in items:
        alike.setdefault(item.shape, []).append(item)
    coded: dict[str, Coded] = {}
    centres = np.zeros((2, 64, 17))
    for (rows, cols), members in alike.items():
        size = max(1, _together(members[0].device) // max(1, rows * cols + cols * cols))
        for at in range(0, len(members), size):
            batch = members[at : at + size]
            rounded = _round_batch(batch, steps, shrink, options)
            centres += rounded.centres

            def collect(i: int, batch: list[Prepared] = batch, rounded: Rounded = rounded) -> Coded:
                return _collect(batch[i], i, steps, rounded, options)

            numbers = range(len(batch))
            found = map(collect, numbers) if rounded.on_device else in_threads(collect, numbers)
            coded |= {p.unit.name: keep(x) for p, x in zip(batch, found, strict=True)}
            if progress is not None:
                progress(rows * cols * len(batch))
    return {item.unit.name: coded[item.unit.name] for item in items}, centres


def _together(device: torch.device) -> int:
    """Return the number of weights and Hessian entries that are rounded together."""
    if device.type != "cuda":
        return _BATCH_VALUES
    return min(2**28, torch.cuda.get_device_properties(device).total_memory // _BYTES_A_VALUE)


@cache
def _trellis(device: str) -> Callable[..., Rounded]:
    """Return the function that rounds along the trellis on a kind of device."""
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        from bytecap.quantization import cuda as there

        return there.round_trellis
    return round_trellis


def _round_batch(items: Sequence[Prepared], steps: Mapping[str, float], shrink: Shrink, options: Options) -> Rounded:
    """Round equally shaped units together."""
    first = items[0]
    weight = torch.empty(len(items), *reversed(first.shape), device=first.device)
    rows = []
    for i, item in enumerate(items):
        row_step = torch.exp2(item.row_step.float() / 4)
        weight[i] = (item.weight / row_step[:, None]).T[item.order]
        rows.append(item.rows.float() * row_step.square())
    lower = torch.stack([item.lower.whole() for item in items])
    order = torch.stack([item.order for item in items])
    step = torch.tensor([steps[item.unit.name] for item in items], dtype=torch.float32, device=weight.device)
    classes = row_classes(weight, lower, step, options.row_class)
    problem = RoundingProblem(weight, lower, order, torch.stack(rows), classes)
    if options.trellis:
        return _trellis(weight.device.type)(
            problem, step, shrink, FIRST_DEPENDENT, options.memory, waterfill=options.waterfill
        )
    return round_scalar(problem, step, shrink, waterfill=options.waterfill)


def _collect(item: Prepared, i: int, steps: Mapping[str, float], rounded: Rounded, options: Options) -> Coded:
    """Return unit `i` of a rounded batch as it would be stored."""
    column, row = rounded.column_class[i], rounded.row_class[i]
    first = FIRST_DEPENDENT if options.trellis else CLASSES
    symbols: Any = rounded.symbols[i]
    symbols, counts = (_stored_there if rounded.on_device else _stored)(symbols, column, row, first)
    code = GridCode(
        step=float(np.float32(steps[item.unit.name])), symbols=symbols, column_step=rounded.column_step[i][None],
        column_class=column[None], row_step=item.row_step.cpu().numpy(), row_class=row, first=first,
        memory=options.memory,
    )  # fmt: skip
    return Coded(code, float(rounded.distortion[i]), counts)


def _width(peak: int) -> str:
    """Return the smallest integer type of symbols up to a size."""
    return "int8" if peak < 2**7 else "int16" if peak < 2**15 else "int32"


def _stored(
    symbols: npt.NDArray[Any], column: npt.NDArray[Any], row: npt.NDArray[Any], first: int
) -> tuple[npt.NDArray[Any], Counts]:
    """Return symbols (rows, cols), a byte each where they fit, and their counts.

    Args:
        symbols: (cols, rows).
        column: (cols,) classes.
        row: (rows,) classes.
        first: class of dependent columns.
    """
    peak = max(int(symbols.max()), -int(symbols.min())) if symbols.size else 0
    out = np.empty((len(row), len(column)), _width(peak))
    counts = np.zeros((2, CLASSES, min(peak, MAX_HALF + 1) + 1))
    fine = column >= first
    store(
        symbols, column.astype(np.int64), fine * OCTAVE, fine.astype(np.int64), row.astype(np.int64), out, counts
    )  # fmt: skip
    return out, counts


def _stored_there(
    symbols: Tensor, column: npt.NDArray[Any], row: npt.NDArray[Any], first: int
) -> tuple[npt.NDArray[Any], Counts]:
    """Return what `_stored` returns, computed on the device that holds the symbols."""
    device = symbols.device
    peak = int(symbols.abs().max()) if symbols.numel() else 0
    last = min(peak, MAX_HALF + 1)
    own = torch.from_numpy(column).to(device, torch.int64)[:, None]
    fine = (own >= first).long()
    cls = classes_there(own, torch.from_numpy(row).to(device, torch.int64), fine)
    at = (fine * CLASSES + cls) * (last + 1) + symbols.abs().clamp(max=last)
    counts = torch.bincount(at.reshape(-1), minlength=2 * CLASSES * (last + 1))
    out = symbols.T.to(getattr(torch, _width(peak))).contiguous().cpu().numpy()
    return out, counts.reshape(2, CLASSES, last + 1).double().cpu().numpy()


def rate(coded: Coded, shared: Shared) -> float:
    """Estimate the bytes of a unit's section: payload code length, side information, header and overlay."""
    if coded.as_in_base:
        return 0.0
    bits = side_bits(coded.code, shared.tables)
    for counts, cost in zip(coded.counts, (shared.tables.cost_by_size, shared.tables.split_cost), strict=True):
        seen = counts > 0
        bits += float(counts[seen] @ cost[:, : counts.shape[1]][seen])
    if coded.below is not None:
        bits += 8 * ON_BASE
    return bits / 8 + (STACK.growth(bits / 8, coded.overlay[1]) if coded.overlay else 0)
