"""Code the tensors of a file of blocks anew, group after group, while what is not coded yet is tuned end to end.

Types stay, and so do the bytes. It is the first stage of recovery, as `bytecap.recovery.tuning` has it for the
package's own format: between two groups Adam moves the values of all that is not coded yet along the gradient of the
KL to the original, and behind every coding a walk gives the next tensors least-squares targets
(`bytecap.recovery.group_walk`). Moves are in steps of a grid that rounding has shown: a uniform error of step `s` has
a mean square of `s^2 / 12`.

Sources: QuIP# (arXiv:2402.04396) for tuning what is not quantized yet, block after block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bytecap.allocation.target_fit import trial_rows
from bytecap.job import Job
from bytecap.model.quantized_copy import Values, as_stored
from bytecap.recovery import loop
from bytecap.recovery.coding_pace import CodingPace
from bytecap.recovery.group_walk import GroupWalk
from bytecap.recovery.kl_passes import Passes
from bytecap.recovery.loop import Clock
from bytecap.runtimes.gguf.menu import Item
from bytecap.runtimes.gguf.rounding import Coding, Rounded, round_all
from bytecap.runtimes.gguf.solve import Found, rounded_values
from bytecap.runtimes.gguf.targets import members_of, moved_to, row_weights
from bytecap.sizes import in_parts
from bytecap.types import as_matrix

RATE = 0.004  # learning rate of values, in steps of each one's grid
GROUPS = 24  # times that tensors are coded
_WARMING = 10  # iterations until the full rate
_TOGETHER = 32  # columns that share a step here
_LEAST = 1e-4  # step in root mean squares of a matrix, where rounding leaves nothing


class BlockUnits:
    """Units of which a file holds every row in a competing tensor: their values, and their codes once they have any.

    Attributes:
        rounded: tensors that are coded, by name.
    """

    def __init__(self, job: Job, items: Sequence[Item], coding: Coding, found: Found) -> None:
        """Start with nothing coded, at the model's own values."""
        self._job, self._coding, self._settings = job, coding, found.settings
        self._members = members_of(job.model.units, items)
        self._units = {u.name: u for u in job.model.units if u.name in self._members}
        self._grid, self._points = dict[str, Tensor](), dict[str, Tensor]()
        self._values = dict[str, Tensor]()  # of units that are coded, in stored layout
        self.rounded = dict[str, Rounded]()
        for n, unit in self._units.items():
            matrix = as_matrix(unit, job.model.tensor(unit).detach()).to(job.device, torch.float32)
            self._grid[n] = self._steps(n, matrix, found.rounded)
            self._points[n] = matrix / self._grid[n]

    def _steps(self, name: str, matrix: Tensor, rounded: Mapping[str, Rounded]) -> Tensor:
        """Return the step (rows, cols) of every value's grid, from what rounding and the plan's targets have left."""
        step = np.empty(tuple(matrix.shape), np.float32)
        for item in self._members[name]:
            error = np.square(rounded[item.place.name].values - item.weight, dtype=np.float64)
            starts = np.arange(0, error.shape[1], _TOGETHER)
            widths = np.diff(np.append(starts, error.shape[1]))
            mean = np.add.reduceat(error, starts, 1) / widths
            item.place.to_unit(np.repeat(np.sqrt(12 * mean).astype(np.float32), widths, 1) + item.place.offset, step)
        least = _LEAST * float(matrix.square().mean().sqrt()) or 1.0
        return torch.from_numpy(step).to(matrix.device).clamp_(min=least)

    @property
    def names(self) -> list[str]:
        """Return the names of the units, in the model's order."""
        return list(self._units)

    def groups(self, most: int) -> list[list[str]]:
        """Split the units, in the model's order, into at most so many groups of about equally many values."""
        return in_parts(self.names, lambda n: self._units[n].parameters, most)

    def tuned(self) -> dict[str, Tensor]:
        """Return the values of units that are not coded yet, in steps of their grids."""
        return dict(self._points)

    def values(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the present values of units, all by default, in stored layout."""
        return {
            n: as_stored(self._units[n], self._weight(n)) if self.waits(n) else self._values[n]
            for n in (self.names if names is None else names)
        }

    def _weight(self, name: str) -> Tensor:
        """Return the present values (rows, cols) of a unit that is not coded yet."""
        return self._points[name] * self._grid[name]

    def slope(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient in steps of the grid, from that of the stored values."""
        return as_matrix(self._units[name], gradient) * self._grid[name]

    def waits(self, name: str) -> bool:
        """See `TunedUnits`."""
        return name in self._points

    def trial(self, name: str) -> tuple[Tensor, Tensor]:
        """See `TunedUnits`."""
        return trial_rows(self._weight(name), row_weights(self._members[name]))

    def times(self, name: str, matrix: Tensor) -> Tensor:
        """See `TunedUnits`."""
        return self._weight(name) @ matrix

    def round(self, names: Sequence[str], changes: Mapping[str, Tensor]) -> Values:
        """See `TunedUnits`."""
        aimed = {n: self._weight(n) + changes.get(n, 0.0) for n in names}
        moved = [moved_to(i, w) for n, w in aimed.items() for i in self._members[n]]
        coded = round_all(self._coding, moved, self._settings, lambda _: None)
        self.rounded |= coded
        found = rounded_values(self._job.model, moved, coded)
        for n in names:
            del self._points[n], self._grid[n]
        self._values |= {n: torch.from_numpy(v).to(self._job.device) for n, v in found.items()}
        return found

    def move(self, changes: Mapping[str, Tensor]) -> Values:
        """See `TunedUnits`."""
        for n, change in changes.items():
            self._points[n] += change / self._grid[n]  # in place: an optimizer follows it
        return self.values(list(changes))


def code_anew(units: BlockUnits, passes: Passes, quantized_copy: nn.Module, walk: GroupWalk, clock: Clock) -> bool:
    """Code all units, group after group, and tune the rest in between; returns False if that is given up.

    Args:
        units: none of which is coded.
        passes: over the tokens to tune on.
        quantized_copy: the copy of the model that they load values into; it holds what is coded afterwards.
        walk: of groups.
        clock: of the effort.
    """
    optimizer = loop.adam((t, RATE) for t in units.tuned().values())
    sound, pace = True, CodingPace(clock, units.groups(clock.parts(GROUPS - 1) + 1), behind=False)
    for group in pace:
        passes.load(units.values())
        walk.code(quantized_copy, group, units)
        pace.coded()
        if not pace.worth:
            return False
        loop.keep_only(optimizer, units.tuned().values())
        while sound and pace.left and clock.done < pace.until:
            passes.load(units.values())
            kl, slopes = passes.gradients(list(units.tuned()))
            clock.tick()
            sound = math.isfinite(kl)
            if not sound:  # what is left is coded as it is, and the correction tokens decide
                break
            for n, t in units.tuned().items():
                t.grad = units.slope(n, slopes.pop(n))
            loop.set_rates(optimizer, loop.warmed(clock, _WARMING))
            optimizer.step()
            optimizer.zero_grad()
    passes.load(units.values())
    return True
