"""Coded units that move: what a file stores of them as tensors, and the model's values as a function of those.

Of a matrix on a grid three things can move. Its *shadow*, what error feedback really rounded, in steps of each weight's
grid; with frozen codes only its integers count. The logarithm of its step. And the reconstruction offsets of its
classes, which all matrices share. Vectors move as a whole and are rounded on their own grid. None of it changes the
number of stored values, and all but the integers take the same bytes wherever they move.

Gradients pass through the rounding unchanged (straight-through); what an integer costs under the file's tables adds its
own slope. Sources: LSQ (arXiv:1902.08153) for steps learned through rounding; PV-Tuning (arXiv:2405.14852) for tuning
continuous and discrete parts by one loss; reverse water-filling for one slope between nats and bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bytecap.coders import Shared
from bytecap.coders.classes import CENTRES, CLASSES
from bytecap.coders.vector import CODER as VECTOR
from bytecap.core import Unit
from bytecap.frequencies import Tables
from bytecap.methods.waterfill import Planner, State, decode_grid
from bytecap.model.blind import as_matrix
from bytecap.rounding import Shrink
from bytecap.rounding.walk import Shape, nearest
from bytecap.sweep import Coded, Prepared

_SIZES = 130  # |z| that have a cost of their own; larger ones cost what the last one does
_SPREAD = 1024  # partial sums of a bin: added up in a fixed order, and few at a time


def shadow(item: Prepared, decoded: Tensor) -> Prepared:
    """The unit as the values that were rounded, to be rounded without feedback; (rows, cols) decoded as it was.

    Rounding what is returned gives the same integers as rounding `item` did.
    """
    target = torch.empty_like(item.weight)
    lowers = []
    rows = [torch.tensor_split(x, item.groups) for x in (item.weight, decoded, target)]
    for weight, coded, part, lower, order in zip(*rows, item.lower, item.order, strict=True):
        diag = lower.diagonal()
        error = (weight - coded)[:, order]
        part[:, order] = weight[:, order] + error @ torch.tril(lower, -1) / diag
        lowers.append(torch.diag(diag))
    return replace(item, weight=target, lower=torch.stack(lowers))


@dataclass(frozen=True)
class _Grid:
    """What stays of a matrix while it moves: (rows, 1), (1 or rows, cols), and its classes.

    Attributes:
        row, column: steps of the grid are their product; the column's hold the unit's own step and halves.
        coarse: (1 or rows, cols), 2 where the grid is fine: offsets are in steps of the column.
        classes: (rows, cols), uint8.
        kind: (1 or rows, cols), 64 where the grid is fine, else 0.
    """

    unit: Unit
    row: Tensor
    column: Tensor
    coarse: Tensor
    classes: Tensor
    kind: Tensor
    shape: Shape

    @staticmethod
    def of(item: Prepared, coded: Coded) -> _Grid:
        """Of a matrix and its code."""
        code, device = coded.code, item.weight.device
        half = np.where(code.fine, np.float32(0.5), np.float32(1))
        column = np.float32(code.step) * np.exp2(code.column_step.astype(np.float32) / 4) * half  # (groups, cols)

        def whole(array: np.ndarray) -> Tensor:  # type: ignore[type-arg]
            if len(array) > 1:
                counts = [len(p) for p in np.array_split(np.arange(len(code.row_step)), len(array))]
                array = np.repeat(array, counts, axis=0)
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        row = torch.from_numpy(np.exp2(code.row_step.astype(np.float32) / 4))[:, None].to(device)
        weight = item.rows.float() * row[:, 0].square()
        return _Grid(
            item.unit, row, whole(column), whole(1 / half), torch.from_numpy(code.classes()).to(device),
            whole(code.fine.astype(np.int64) * CLASSES), Shape(weight, torch.from_numpy(code.fine).to(device)),
        )  # fmt: skip


class Prices:
    """Bits of an integer under a file's tables, and by how much they rise from one to the next."""

    def __init__(self, tables: Tables, device: torch.device) -> None:
        def table(cost: np.ndarray, far: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
            cost = np.minimum(cost[:, : _SIZES + far], 64.0)
            size = np.arange(_SIZES)
            return cost[:, :_SIZES], (cost[:, size + far] - cost[:, np.abs(size - far)]) / (2 * far)

        parts = [table(tables.cost_by_size, 1), table(tables.split_cost, 4)]
        self.bits, self.slope = (
            torch.from_numpy(np.stack(x).astype(np.float32)).reshape(-1).to(device) for x in zip(*parts, strict=True)
        )

    def places(self, grid: _Grid, points: Tensor) -> Tensor:
        """Where a matrix's integers stand in both tables."""
        return (grid.kind + grid.classes) * _SIZES + points.abs().clamp_(max=_SIZES - 1).long()


class _Offsets:
    """Reconstruction offsets as one tensor: an entry for each table and |z| that the file stores; entry 0 is 0."""

    def __init__(self, shared: Shared, device: torch.device) -> None:
        place = np.zeros((CLASSES, CENTRES), np.int64)
        values, seen = [0.0], {}
        for cls, table in shared.tables.table.items():
            if id(table) not in seen:
                seen[id(table)] = len(values)
                values += shared.offset[cls, 1 : min(table.high, CENTRES - 1) + 1].tolist()
            size = np.minimum(np.arange(CENTRES), table.high)
            place[cls] = np.where(size > 0, seen[id(table)] + size - 1, 0)
        self._place, self._shared = place, shared
        self.place = torch.from_numpy(place).reshape(-1).to(device)
        self.values = torch.tensor(values, dtype=torch.float32, device=device)

    def stored(self, values: Tensor) -> Tensor:
        """As a file holds them, in 256ths; entry 0 is 0."""
        found = values.mul(256).round_().clamp_(-128, 127).div_(256)
        found[0] = 0
        return found

    def table(self, values: Tensor) -> np.ndarray:  # type: ignore[type-arg]
        """By class and |z|, (64, 17); classes without a table keep theirs."""
        has = np.zeros((CLASSES, 1), bool)
        has[list(self._shared.tables.table)] = True
        moved = self.stored(values).cpu().numpy()[self._place]
        return np.where(has, moved, self._shared.offset).astype(np.float32)


class Live:
    """The units of a settled plan, moving.

    Attributes:
        shadows: by matrix, (rows, cols) in steps of the grid.
        vectors: by vector, its values.
        logs: (matrices,), logarithms of what steps are multiplied by.
        offsets: reconstruction offsets, see `_Offsets`.
        points: by matrix, its integers as float32.
    """

    def __init__(self, planner: Planner, state: State, device: str) -> None:
        self._planner, self._state, self._device = planner, state, torch.device(device)
        self._grids: dict[str, _Grid] = {}
        self.shadows: dict[str, Tensor] = {}
        self.points: dict[str, Tensor] = {}
        self._matrices: dict[str, Prepared] = {}
        for item in planner.matrices:
            if type(item) is not Prepared:
                continue
            name, coded = item.unit.name, state.coded[item.unit.name]
            decoded = torch.from_numpy(decode_grid(coded.code, state.shared)).to(item.weight.device)
            self._matrices[name] = shadow(item, decoded)
            self._grids[name] = grid = _Grid.of(item, coded)
            self.shadows[name] = self._matrices[name].weight / (grid.row * grid.column)
            self.points[name] = torch.from_numpy(coded.code.symbols.astype(np.float32)).to(item.weight.device)
        self._vectors = {v.unit.name: v for v in planner.vectors}
        self.vectors = {
            n: torch.from_numpy(v.values.copy()).to(self._device) for n, v in self._vectors.items() if v.fisher.any()
        }
        self._offsets = _Offsets(state.shared, self._device)
        self.offsets = self._offsets.values.clone()
        self.logs = torch.zeros(max(1, len(self._grids)), device=self._device)
        self.common = 0.0  # logarithm of what all steps are multiplied by, so that bytes stay the same
        self._prices = Prices(state.shared.tables, self._device)

    @property
    def names(self) -> list[str]:
        """Units that move."""
        return [*self._grids, *self.vectors]

    def tensors(self) -> dict[str, Tensor]:
        """All that moves, by what it is."""
        return {
            "logs": self.logs, "offsets": self.offsets, **{f"shadow {n}": t for n, t in self.shadows.items()},
            **{f"vector {n}": t for n, t in self.vectors.items()},
        }  # fmt: skip

    def round(self) -> None:
        """Round the shadows anew."""
        rounded = nearest(list(self.shadows.values()), [g.shape for g in self._grids.values()])
        self.points = dict(zip(self._grids, rounded, strict=True))

    def bits(self) -> float:
        """Bits of all integers under the file's tables."""
        parts = [self._prices.bits[self._prices.places(g, self.points[n])].sum() for n, g in self._grids.items()]
        return float(torch.stack(parts).double().sum()) if parts else 0.0

    def widen(self, change: float) -> None:
        """Multiply all steps by `exp(change)`; what is rounded stays where it is."""
        self.common += change
        for t in self.shadows.values():
            t.mul_(math.exp(-change))

    def _scale(self, at: int) -> Tensor:
        return torch.exp(self.logs[at] + self.common)

    def _matrix(self, name: str, at: int, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, what of them a unit of offset takes away, and the offsets' places."""
        g, z = self._grids[name], self.points[name]
        place = self._offsets.place[g.classes.long() * CENTRES + z.abs().clamp_(max=CENTRES - 1).long()]
        step = g.row * (g.column * self._scale(at))
        lever = torch.sign(z) * g.coarse
        return (z - lever * offsets[place]) * step, lever.mul_(step), place

    def values(self) -> dict[str, Tensor]:
        """Decoded values of all that moves, in stored layout."""
        offsets = self._offsets.stored(self.offsets)
        found = {}
        for at, (n, g) in enumerate(self._grids.items()):
            matrix = self._matrix(n, at, offsets)[0]
            found[n] = (matrix.T if g.unit.transposed else matrix).reshape(g.unit.shape)
        for n, t in self.vectors.items():
            v = replace(self._vectors[n], values=t.cpu().numpy())
            step = v.step(self._state.steps[n])
            centre, symbols = VECTOR.quantize(v.values, step)
            stored = VECTOR.dequantize(centre, step, symbols)
            found[n] = torch.from_numpy(stored.reshape(v.unit.shape)).to(self._device)
        return found

    def gradients(self, found: Mapping[str, Tensor], nats_per_bit: float, *, integers: bool) -> dict[str, Tensor]:
        """Gradients of all that moves from those of the stored values; the price of the integers is added to theirs."""
        offsets = self._offsets.stored(self.offsets)
        logs, bins = [], torch.zeros(_SPREAD * len(offsets), device=self._device)
        out: dict[str, Tensor] = {}
        for at, (n, g) in enumerate(self._grids.items()):
            gradient = as_matrix(g.unit, found[n])
            value, lever, place = self._matrix(n, at, offsets)
            logs.append((gradient * value).sum())
            spread = torch.arange(place.numel(), device=self._device).remainder_(_SPREAD) * len(offsets)
            bins.index_put_((place.reshape(-1) + spread,), -(gradient * lever).reshape(-1), accumulate=True)
            if integers:
                price = self._prices.slope[self._prices.places(g, self.points[n])] * torch.sign(self.points[n])
                out[f"shadow {n}"] = gradient * g.row * (g.column * self._scale(at)) + nats_per_bit * price
        out["logs"] = torch.stack(logs) if logs else torch.zeros_like(self.logs)
        out["offsets"] = bins.reshape(_SPREAD, -1).sum(0)
        return out | {f"vector {n}": found[n].reshape(t.shape) for n, t in self.vectors.items()}

    def settle(self) -> State:
        """Put everything into the planner, and round it as it would be stored."""
        planner, steps = self._planner, dict(self._state.steps)
        moved = {}
        for at, (n, g) in enumerate(self._grids.items()):
            scale = float(self._scale(at))
            steps[n] = steps[n] * scale
            moved[n] = replace(self._matrices[n], weight=self.shadows[n] * g.row * (g.column * scale))
        planner.matrices = [moved.get(p.unit.name, p) for p in planner.matrices]
        planner.vectors = [
            replace(v, values=self.vectors[n].cpu().numpy().copy()) if (n := v.unit.name) in self.vectors else v
            for v in planner.vectors
        ]
        offset = self._offsets.table(self.offsets)
        planner.shared = replace(self._state.shared, offset=offset)
        planner.shrink = Shrink(offset, planner.shrink.dead_zone)
        return planner.settle(steps, refit=False)
