"""Hold the stored values of coded units as tunable tensors, and the model's values as a function of them.

Of a coded matrix two things are tuned, which take the same bytes whatever their values: the logarithm of its step, and
the reconstruction offsets of its classes, which all matrices share. Vectors are tuned as a whole and rounded on their
own grid; their gradient passes through that rounding unchanged (straight through). Of a matrix that is not coded yet
the target is tuned, weight by weight; the price of its nearest integer under the file's tables is part of the loss.

Sources: LSQ (arXiv:1902.08153) for steps learned with codes; reverse water-filling for one slope between nats and
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bytecap.allocation.differences import DifferenceUnit
from bytecap.allocation.planner import Planner, State
from bytecap.allocation.target_fit import trial_of
from bytecap.format.coders.grid import GridCode
from bytecap.format.coders.trellis import dependent
from bytecap.format.entropy.shared_tables import count_symbols
from bytecap.model.quantized_copy import as_stored
from bytecap.quantization.quantizer import Coded, Prepared, rate
from bytecap.quantization.stored import StoredPrepared
from bytecap.quantization.symbols_there import symbols_anywhere
from bytecap.recovery.code_values import Grid, Offsets, Prices
from bytecap.recovery.group_walk import TunedUnits
from bytecap.sizes import in_parts
from bytecap.types import as_matrix

_CODE = ("symbols", "column_step", "column_class", "row_step", "row_class")  # arrays of a code
Walk = Callable[[Sequence[str], TunedUnits], None]
"""Codes units stage by stage."""
_SPREAD = 1024  # partial sums of a bin: added up in a fixed order, and few at a time


@dataclass
class _Matrix:
    """The state of one matrix during recovery.

    Attributes:
        item: with the target it was coded from.
        grid: of the code; of the plan before there is one.
        plan: grid in whose steps the target is.
        target: (rows, cols).
        step: that it is, or is to be, rounded at.
        coded: what came out; None before.
        points: its integers as float32 once it is coded.
        place: of their offsets, int16.
    """

    item: Prepared
    grid: Grid
    plan: Grid
    target: Tensor
    step: float
    coded: Coded | None = None
    points: Tensor | None = None
    place: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """Return the target, float32 (rows, cols)."""
        return self.target * self.plan.row * self.plan.column


def moves(item: Prepared) -> bool:
    """Whether a matrix is coded anew: those under an overlay keep their integers."""
    return type(item) is Prepared or isinstance(item, DifferenceUnit | StoredPrepared)


class TunedParameters:
    """The tunable tensors of a settled plan.

    Attributes:
        logs: (matrices,), logarithms of what steps are multiplied by once a matrix is coded.
        offsets: reconstruction offsets, see `Offsets`.
        vectors: by vector, its values.
    """

    def __init__(self, planner: Planner, state: State, device: str) -> None:
        """Start from `state`, in which every unit is coded."""
        self._planner, self._state, self._device = planner, state, torch.device(device)
        self._rules = state.rules  # with the current offsets
        self._offsets = Offsets(state.shared, self._device)
        self._matrices: dict[str, _Matrix] = {}
        for item in planner.matrices:
            name = item.unit.name
            if moves(item):
                grid = Grid.of(item, state.coded[name])
                target = item.weight / (grid.row * grid.column)
                self._matrices[name] = _Matrix(item, grid, grid, target, state.steps[name])
                self._put(name, item, state.coded[name])
        self._aims: dict[str, Tensor] = {}  # what the last group was to be coded to, before a walk moved it
        self._vectors = {v.unit.name: v for v in planner.vectors}
        self.vectors = {
            n: torch.from_numpy(v.values.copy()).to(self._device) for n, v in self._vectors.items() if v.fisher.any()
        }
        self.offsets = self._offsets.values.clone()
        self.logs = torch.zeros(max(1, len(self._matrices)), device=self._device)
        self._prices = Prices(state.shared.tables, self._device)

    @property
    def matrices(self) -> list[str]:
        """Return the names of tuned matrices."""
        return list(self._matrices)

    @property
    def names(self) -> list[str]:
        """Return the names of tuned units."""
        return [*self._matrices, *self.vectors]

    def vector_size(self, name: str) -> float:
        """Mean size of a vector's values, those of the base among them."""
        held, below = self.vectors[name], self._vectors[name].below
        if below is not None:
            held = held.reshape(below.shape) + torch.from_numpy(below).to(held.device)
        return float(held.abs().mean())

    def groups(self, most: int) -> list[list[str]]:
        """Split the matrices, in the model's order, into at most so many groups of about equally many weights."""
        return in_parts(self.matrices, lambda n: self._matrices[n].target.numel(), most, fill=True)

    def unfreeze(self, own: Mapping[str, Tensor]) -> None:
        """Mark all matrices as not coded yet, at the model's own values.

        Targets that they were coded from make up for what others were coded to, and all of it is drawn anew.

        Args:
            own: the original's tensors in stored layout, by name.
        """
        for n, m in self._matrices.items():
            m.coded = m.points = None
            weight = as_matrix(m.item.unit, own[n].detach()).to(m.target)
            if isinstance(m.item, DifferenceUnit):
                weight = weight - torch.from_numpy(m.item.below).to(weight.device)
            m.target = weight / (m.plan.row * m.plan.column)

    def values_only(self) -> dict[str, Tensor]:
        """Return the tensors that are tuned while codes are frozen, by name."""
        return {"logs": self.logs, "offsets": self.offsets, **{f"vector {n}": t for n, t in self.vectors.items()}}

    def targets(self) -> dict[str, Tensor]:
        """Return the targets of matrices that are not coded yet."""
        return {f"target {n}": m.target for n, m in self._matrices.items() if m.coded is None}

    def code(self, names: list[str], change: float, walk: Walk | None = None) -> float:
        """Round and freeze matrices at `exp(change)` times their steps; returns the bytes beyond those planned.

        Args:
            names: of the matrices. If they are coded already, they are coded anew at the same targets.
            change: of the logarithm of their steps.
            walk: codes them stage by stage; all at once by default.
        """
        self._aim(names)
        self._set_offsets()
        for n in names:
            self._matrices[n].step = self._state.steps[n] * math.exp(change)
        if walk is None:
            self.round(names, {})
        else:
            walk(names, self)
        coded = {n: self._matrices[n].coded for n in names}
        return sum(rate(c, self._rules.shared) - self._state.rates[n] for n, c in coded.items() if c is not None)

    def _aim(self, names: Sequence[str]) -> None:
        """Mark matrices that are to be coded as not coded yet, at the targets from before a walk moved them."""
        if self._aims.keys() != set(names):
            self._aims = {n: self._matrices[n].target for n in names}
        for n in names:
            m = self._matrices[n]
            m.target, m.coded, m.points, m.place = self._aims[n], None, None, None

    def waits(self, name: str) -> bool:
        """See `TunedUnits`."""
        return name in self._matrices and self._matrices[name].coded is None

    def trial(self, name: str) -> tuple[Tensor, Tensor]:
        """See `TunedUnits`."""
        return trial_of(self._item(name))

    def times(self, name: str, matrix: Tensor) -> Tensor:
        """See `TunedUnits`."""
        return self._item(name).times(matrix)

    def _item(self, name: str) -> Prepared:
        m = self._matrices[name]
        return replace(m.item, weight=m.weight)

    def round(self, names: Sequence[str], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `TunedUnits`."""
        items = [item.moved(changes[n]) if n in changes else item for n in names for item in (self._item(n),)]
        coded = self._planner.round(items, {n: self._matrices[n].step for n in names}, self._rules)
        for n, item in zip(names, items, strict=True):
            m = self._matrices[n]
            m.target = item.weight / (m.plan.row * m.plan.column)
            self._put(n, item, coded[n])
        return self.values(names)

    def move(self, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `TunedUnits`."""
        for n, change in changes.items():
            m = self._matrices[n]
            m.target += change / (m.plan.row * m.plan.column)  # in place: an optimizer follows it
        return self.values(changes)

    def _put(self, name: str, item: Prepared, coded: Coded) -> None:
        m = self._matrices[name]
        m.coded, m.grid, m.item = coded, Grid.of(item, coded), item
        m.points = symbols_anywhere(coded.code).to(item.weight.device, torch.float32)
        m.place = self._offsets.places(m.grid, m.points)

    def planned(self, names: list[str]) -> tuple[float, int]:
        """Return the bytes planned for matrices, and the number of their weights."""
        return sum(self._state.rates[n] for n in names), sum(self._matrices[n].target.numel() for n in names)

    def _decoded(self, m: _Matrix, at: int, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the values, their change by a unit of offset, and the places of the offsets."""
        g, z = m.grid, m.points
        assert z is not None and m.place is not None  # noqa: S101, PT018 (callers ask first)
        place = m.place.int()
        step = g.row * (g.column * torch.exp(self.logs[at]))
        lever = torch.sign(z) * g.coarse
        shift = offsets.index_select(0, place.flatten()).view_as(z)
        return torch.sub(z, shift.mul_(lever)).mul_(step), lever.mul_(step), place

    def values(self, only: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the values of all tuned units, or some, in stored layout, decoded where they are coded."""
        offsets = self._offsets.stored(self.offsets)
        found = {}
        for at, (n, m) in enumerate(self._matrices.items()):
            if only is not None and n not in only:
                continue
            g = m.grid
            matrix = m.weight if m.points is None else self._decoded(m, at, offsets)[0]
            if isinstance(m.item, DifferenceUnit):
                matrix = matrix + torch.from_numpy(m.item.below).to(matrix.device)
            found[n] = as_stored(g.unit, matrix)
        for n, t in self.vectors.items():
            if only is not None and n not in only:
                continue
            v = replace(self._vectors[n], values=t.cpu().numpy())
            finite = np.isfinite(v.values).all()  # else the KL says so
            stored = v.decode(self._state.steps[n]) if finite else v.values
            found[n] = torch.from_numpy(stored.reshape(v.unit.shape)).to(self._device)
        return found

    def gradients(self, found: Mapping[str, Tensor], nats_per_bit: float) -> dict[str, Tensor]:
        """Return gradients of all tuned tensors from those of the values; targets add their integers' price."""
        offsets = self._offsets.stored(self.offsets)
        logs = [torch.zeros((), device=self._device)] * len(self.logs)
        bins = torch.zeros(_SPREAD * len(offsets), device=self._device)
        out: dict[str, Tensor] = {}
        for at, (n, m) in enumerate(self._matrices.items()):
            gradient = as_matrix(m.grid.unit, found[n])
            if m.points is None:
                g = m.plan
                near = m.target.round()
                price = self._prices.slope[self._prices.places(g, near)] * torch.sign(near)
                out[f"target {n}"] = gradient * g.row * g.column + nats_per_bit * price
                continue
            value, lever, place = self._decoded(m, at, offsets)
            logs[at] = (gradient * value).sum()
            spread = torch.arange(place.numel(), device=self._device).remainder_(_SPREAD) * len(offsets)
            bins.index_put_((place.reshape(-1) + spread,), -(gradient * lever).reshape(-1), accumulate=True)
        out["logs"], out["offsets"] = torch.stack(logs), bins.reshape(_SPREAD, -1).sum(0)
        return out | {f"vector {n}": found[n].reshape(t.shape) for n, t in self.vectors.items()}

    def _set_offsets(self) -> None:
        """Round and decode with the current offsets from now on."""
        self._rules = self._state.rules.with_offsets(self._offsets.table(self.offsets))

    def settle(self) -> tuple[Planner, State]:
        """Return a planner with the current targets, for rounding anew, and the state of all coded units."""
        planner, steps, coded = self._planner, dict(self._state.steps), dict(self._state.coded)
        moved = {}
        for at, (n, m) in enumerate(self._matrices.items()):
            assert m.coded is not None  # noqa: S101 (stages leave everything coded)
            scale = float(torch.exp(self.logs[at]))
            steps[n] = m.step * scale
            coded[n] = m.coded.at_step(steps[n])
            moved[n] = replace(m.item, weight=m.item.weight * scale)
        self._set_offsets()
        vectors = [
            replace(v, values=self.vectors[n].cpu().numpy().copy()) if (n := v.unit.name) in self.vectors else v
            for v in planner.vectors
        ]
        planner = replace(planner, matrices=[moved.get(p.unit.name, p) for p in planner.matrices], vectors=vectors)
        return planner, planner.price(coded, steps, self._rules)

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the tensors that are tuned while codes are frozen."""
        return {n: t.clone() for n, t in self.values_only().items()}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Restore the tensors of a snapshot."""
        for n, t in self.values_only().items():
            t.copy_(kept[n])

    def state(self) -> dict[str, Tensor]:
        """Return all tuned tensors and all codes as tensors by name, for `resume`."""
        found = self.snapshot() | {f"target {n}": m.target.clone() for n, m in self._matrices.items()}
        for n, m in self._matrices.items():
            if m.coded is not None:
                code = m.coded.code
                found |= {f"{k} {n}": torch.from_numpy(getattr(code, k).copy()) for k in _CODE}
                found[f"step {n}"] = torch.tensor([m.step, code.step, code.first, code.memory], dtype=torch.float64)
        return found

    def resume(self, kept: Mapping[str, Tensor]) -> None:
        """Continue from the tensors that `state` returned."""
        self.restore(kept)
        for n, m in self._matrices.items():
            m.target.copy_(kept[f"target {n}"])
            if f"step {n}" not in kept:
                m.coded = m.points = None
                continue
            m.step, step, first, memory = kept[f"step {n}"].tolist()
            arrays = {k: kept[f"{k} {n}"].cpu().numpy() for k in _CODE}
            code = GridCode(**arrays, step=step, first=int(first), memory=int(memory))
            mask = dependent(code.column_class, code.first, len(code.row_class))
            coded = Coded(code, 0.0, count_symbols(code.symbols, code.classes(), mask))
            self._put(n, replace(m.item, weight=m.weight), coded)
