"""Hold prepared and rounded units in work files, and read what is asked for.

For models larger than memory. A unit's factor, weights and symbols are read when they are used, so that a planner over
thousands of matrices holds a few numbers of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytecap.calibration.triangle import Triangle
from bytecap.format.coders.grid import GridCode
from bytecap.format.entropy.shared_tables import Counts
from bytecap.quantization.quantizer import Coded, Prepared, product
from bytecap.quantization.symbols_there import symbols_anywhere
from bytecap.system.scratch import KeptTensor, Scratch
from bytecap.system.slabs import slabs
from bytecap.types import Unit

Rows = Callable[[slice | None], Tensor]  # gives consecutive rows (rows, cols) of a matrix, float32; None for all
_EVERY, _LEAST_ROWS = 8, 512  # a sample holds an eighth of a unit's rows, but at least 512
_ARRAYS = ("symbols", "column_step", "column_class", "row_step", "row_class")


class StoredPrepared(Prepared):
    """A prepared unit whose tensors are read from work files.

    Args:
        prepared: the unit, whose weights may be left out.
        scratch: for what is kept.
        weight: gives the weights whenever they are needed.
    """

    def __init__(self, prepared: Prepared, scratch: Scratch, weight: Rows) -> None:
        kept = {n: scratch.put(getattr(prepared, n)) for n in ("rows", "row_step", "order")}
        kept["lower"] = scratch.put(prepared.lower.values)
        if prepared.hessian is not None:
            kept["hessian"] = scratch.put(prepared.hessian)
        self._set(prepared.unit, prepared.unit.matrix_shape, prepared.device, scratch, kept, weight)

    def _set(self, *values: Any) -> None:
        names = ("unit", "_shape", "_device", "_scratch", "_kept", "_weight")
        for name, value in zip(names, values, strict=True):
            object.__setattr__(self, name, value)

    unit: Unit
    _shape: tuple[int, int]
    _device: torch.device
    _scratch: Scratch
    _kept: dict[str, KeptTensor]
    _weight: Rows

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of what is rounded."""
        return self._shape

    @property
    def device(self) -> torch.device:
        """Where it is rounded."""
        return self._device

    @property
    def weight(self) -> Tensor:
        """(rows, cols) float32."""
        return self._weight(None)

    def slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weights some rows at a time, each read when it is asked for."""
        if self.unit.transposed:  # whose rows do not lie together
            yield from super().slabs()
            return
        for part in slabs(*self.shape):
            yield part, self._weight(part)

    @property
    def rows(self) -> Tensor:
        """(rows,), weight of each row's error."""
        return self._kept["rows"].load(self._device)

    @property
    def row_step(self) -> Tensor:
        """(rows,), quarter octaves."""
        return self._kept["row_step"].load(self._device)

    @property
    def order(self) -> Tensor:
        """(cols,), stored index of each column."""
        return self._kept["order"].load(self._device)

    @property
    def lower(self) -> Triangle:
        """Cholesky factor."""
        return Triangle(self._kept["lower"].load(self._device), self._shape[1])

    @property
    def hessian(self) -> Tensor | None:
        """(cols, cols) without error feedback."""
        return self._kept["hessian"].load(self._device) if "hessian" in self._kept else None

    def times(self, matrix: Tensor) -> Tensor:
        """Return the weights times a matrix (cols, cols)."""
        return product(self.shape, self.slabs(), matrix)

    def moved(self, change: Tensor | KeptTensor) -> Prepared:
        """The unit with `change` (rows, cols) added to its target."""
        kept = self._scratch.put(change) if isinstance(change, Tensor) else change
        weight = partial(_sum, self._weight, kept_rows(kept, self._device))
        found = StoredPrepared.__new__(StoredPrepared)
        found._set(self.unit, self._shape, self._device, self._scratch, self._kept, weight)  # noqa: SLF001 (its own)
        return found

    def emptied(self) -> Prepared:
        """Itself: it holds nothing."""
        return self


class Sample(StoredPrepared):
    """Every so many rows of a unit, which say what all of them cost: rows are independent, given the factor."""

    _every: float

    @staticmethod
    def of(item: StoredPrepared) -> StoredPrepared:
        """Return a sample of a unit; the unit itself where it has few rows."""
        rows, cols = item.shape
        every = _step(rows)
        if every < 2:
            return item
        weight, scratch, device = item.weight[::every], item._scratch, item.device  # noqa: SLF001 (its own class's)
        kept = dict(item._kept)  # noqa: SLF001
        kept |= {n: scratch.put(getattr(item, n)[::every]) for n in ("rows", "row_step")}
        found = Sample.__new__(Sample)
        read = kept_rows(scratch.put(weight), device)
        found._set(item.unit, (len(weight), cols), device, scratch, kept, read)  # noqa: SLF001
        object.__setattr__(found, "_every", rows / len(weight))
        return found

    def scaled(self, coded: Coded) -> Coded:
        """Costs and counts of all rows, without symbols, which nobody asks a sample for."""
        return StoredCoded(_scaled(coded, self._every), self._scratch)


@dataclass(frozen=True, kw_only=True)
class HeldSample(Prepared):
    """A sample of the rows of a unit in memory.

    Attributes:
        every: rows of the unit for one of the sample.
    """

    every: float

    @staticmethod
    def of(item: Prepared) -> Prepared:
        """See `Sample`."""
        every = _step(item.shape[0])
        if every < 2:
            return item
        rows, weight = slice(None, None, every), item.weight[::every].contiguous()
        return HeldSample(
            item.unit, weight, item.rows[rows], item.row_step[rows], item.lower, item.order, item.hessian,
            every=item.shape[0] / len(weight),
        )  # fmt: skip

    def scaled(self, coded: Coded) -> Coded:
        """Costs and counts of all rows, without symbols."""
        return _scaled(coded, self.every)


def _step(rows: int) -> int:
    """Return how many rows stand between two of a sample of so many."""
    return min(_EVERY, rows // _LEAST_ROWS)


def _scaled(coded: Coded, every: float) -> Coded:
    """Return what a sample says of all rows, without symbols."""
    none = np.zeros((0, coded.code.column_step.shape[1]), np.int8)
    parts = {f.name: getattr(coded.code, f.name) for f in fields(GridCode) if f.name != "symbols"}
    return Coded(GridCode(symbols=none, **parts), coded.distortion * every, coded.counts * every)


def kept_rows(kept: KeptTensor, device: torch.device) -> Rows:
    """Return what gives rows of a matrix in a work file."""
    return partial(kept.load, device)


def _sum(weight: Rows, change: Rows, rows: slice | None) -> Tensor:
    return weight(rows) + change(rows)


class StoredGridCode(GridCode):
    """A grid code whose arrays are read from work files."""

    def __init__(self, code: GridCode, scratch: Scratch) -> None:
        kept = {}
        for name in _ARRAYS:
            if name == "symbols":
                kept[name] = scratch.put(symbols_anywhere(code))
            else:
                kept[name] = scratch.put(torch.from_numpy(np.ascontiguousarray(getattr(code, name))))
        for name, value in (("step", code.step), ("first", code.first), ("memory", code.memory), ("_kept", kept)):
            object.__setattr__(self, name, value)

    _kept: dict[str, KeptTensor]


def _array(name: str) -> Any:
    def read(self: StoredGridCode) -> Any:
        return self._kept[name].load("cpu").numpy()

    return property(read)


for _name in _ARRAYS:
    setattr(StoredGridCode, _name, _array(_name))


class StoredCoded(Coded):
    """A rounded unit whose arrays are read from work files."""

    def __init__(self, coded: Coded, scratch: Scratch) -> None:
        for name, value in (
            ("code", StoredGridCode(coded.code, scratch)), ("distortion", coded.distortion),
            ("overlay", coded.overlay), ("below", coded.below),
            ("_counts", scratch.put(torch.from_numpy(coded.counts))),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    _counts: KeptTensor

    @property
    def counts(self) -> Counts:
        """Histogram of |z| by class."""
        found: Counts = self._counts.load().numpy()
        return found


def keeper(scratch: Scratch) -> Callable[[Coded], Coded]:
    """Return what puts rounded units into work files."""
    return lambda coded: StoredCoded(coded, scratch)


assert {f.name for f in fields(GridCode)} == {*_ARRAYS, "step", "first", "memory"}  # noqa: S101 (two lists of ours)
