"""Predict what other values of one unit recover, by the metric and by the KL's slope at the base.

Both predictions share one product with the Hessian: with `d` the change and `e` the base's error, the metric says
`sum(rows * (e H) * d) + 1/2 d H d`, whose first factor is the same for every change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bytecap.quantization.overlays import UnitProblem

_BLOCK = 2**20  # values whose products are made at a time, so that they stay in a processor's cache


class Recovered(NamedTuple):
    """The nats per token that a change of one unit recovers.

    Attributes:
        metric: by the metric around the weights, to which the base's error counts.
        slope: by the KL's slope at the base; holds the errors of all other units too.
        curved: what the metric takes off `slope` for the change itself, before a factor.
    """

    metric: float
    slope: float
    curved: float


@dataclass(frozen=True)
class Expansion:
    """A unit at the base, on the device where changes are priced.

    Attributes:
        before: the base's values (rows, cols) float32.
        pull: metric's gradient there (rows, cols) float64.
        slope: measured gradient of the KL (rows, cols).
        hessian, rows: the metric, float64.
    """

    before: Tensor
    pull: Tensor
    slope: Tensor
    hessian: Tensor
    rows: Tensor

    @staticmethod
    def at(problem: UnitProblem, before: Tensor, slope: Tensor, device: str = "cpu") -> Expansion:
        """Return the expansion of a unit whose base has these values (rows, cols) and this slope (rows, cols)."""
        weight, before, slope = problem.weight.to(device), before.to(device), slope.to(device)
        hessian, rows = problem.hessian.to(device), problem.rows.to(device)
        pull = torch.empty(weight.shape, dtype=torch.float64, device=device)
        for part in _blocks(weight):
            pull[part] = rows[part, None] * ((before[part].double() - weight[part].double()) @ hessian)
        return Expansion(before, pull, slope, hessian, rows)

    def of(self, values: Tensor) -> Recovered:
        """Return what values (rows, cols) in place of the base's recover.

        `slope - factor * curved` is exact to second order for one unit, and too hopeful for a sum: several units are
        credited with the same slope.
        """
        found = torch.zeros(3, dtype=torch.float64, device=self.before.device)
        values = values.to(self.before.device)
        for part in _blocks(values):
            change = values[part].double() - self.before[part].double()
            found[0] += (self.pull[part] * change).sum()
            found[1] += (self.slope[part].double() * change).sum()
            found[2] += ((change @ self.hessian) * change).sum(1) @ self.rows[part] / 2
        pulled, slope, curved = found.tolist()
        return Recovered(-pulled - curved, -slope, curved)


def _blocks(matrix: Tensor) -> list[slice]:
    rows = max(1, _BLOCK // max(1, matrix.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(matrix), rows)]
