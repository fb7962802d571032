"""Hold what tuning reads of a matrix's code: its grid, the price of its integers, and reconstruction offsets.

Sources: LSQ (arXiv:1902.08153) for steps learned with codes; reverse water-filling for one slope between nats and
bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.coders import Shared
from bytecap.format.coders.classes import CENTRES, CLASSES
from bytecap.format.entropy.frequencies import Tables
from bytecap.quantization.quantizer import Coded, Prepared
from bytecap.types import Unit

_SIZES = 130  # |z| that have a cost of their own; larger ones cost what the last one does


@dataclass(frozen=True)
class Grid:
    """The parts of a matrix's code that tuning leaves alone: its grid (rows, 1) and (1, cols), and its classes.

    Attributes:
        row, column: steps of the grid are their product; the column's hold the unit's own step and halves.
        coarse: (1, cols), 2 where the grid is fine: offsets are in steps of the column.
        classes: (rows, cols), uint8.
        kind: (1, cols), 64 where the grid is fine, else 0.
    """

    unit: Unit
    row: Tensor
    column: Tensor
    coarse: Tensor
    classes: Tensor
    kind: Tensor

    @staticmethod
    def of(item: Prepared, coded: Coded) -> Grid:
        """Read the grid from a matrix and its code."""
        code, device = coded.code, item.weight.device
        half = np.where(code.fine, np.float32(0.5), np.float32(1))
        column = np.float32(code.step) * np.exp2(code.column_step.astype(np.float32) / 4) * half  # (1, cols)

        def whole(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        row = torch.from_numpy(np.exp2(code.row_step.astype(np.float32) / 4))[:, None].to(device)
        return Grid(
            item.unit, row, whole(column), whole(1 / half), torch.from_numpy(code.classes()).to(device),
            whole(code.fine.astype(np.int64) * CLASSES),
        )  # fmt: skip


class Prices:
    """The bits of an integer under a file's tables, and their slope from one integer to the next."""

    def __init__(self, tables: Tables, device: torch.device) -> None:
        def table(cost: npt.NDArray[Any], far: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
            cost = np.minimum(cost[:, : _SIZES + far], 64.0)
            size = np.arange(_SIZES)
            return cost[:, :_SIZES], (cost[:, size + far] - cost[:, np.abs(size - far)]) / (2 * far)

        parts = [table(tables.cost_by_size, 1), table(tables.split_cost, 4)]
        self.bits, self.slope = (
            torch.from_numpy(np.stack(x).astype(np.float32)).reshape(-1).to(device) for x in zip(*parts, strict=True)
        )

    def places(self, grid: Grid, points: Tensor) -> Tensor:
        """Return the places of a matrix's integers in both tables, int64 (rows, cols)."""
        return (grid.kind + grid.classes) * _SIZES + points.abs().clamp_(max=_SIZES - 1).long()


class Offsets:
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

    def places(self, grid: Grid, points: Tensor) -> Tensor:
        """Return the places of the offsets of a matrix's integers, int16 (rows, cols)."""
        return self.place[grid.classes.long() * CENTRES + points.abs().clamp_(max=CENTRES - 1).long()].short()

    def stored(self, values: Tensor) -> Tensor:
        """Return the offsets as a file holds them, in 256ths; entry 0 is 0."""
        found = values.mul(256).round_().clamp_(-128, 127).div_(256)
        found[0] = 0
        return found

    def table(self, values: Tensor) -> npt.NDArray[Any]:
        """Return the offsets by class and |z|, (64, 17); classes without a table keep theirs."""
        has = np.zeros((CLASSES, 1), bool)
        has[list(self._shared.tables.table)] = True
        moved = self.stored(values).cpu().numpy()[self._place]
        return np.where(has, moved, self._shared.offset).astype(np.float32)
