"""Round a matrix of few bits a weight by coordinate descent on what an error and a bit cost.

Error feedback (`bytecap.quantization`) decides on a weight by the error that no later column can undo, and leaves the
rest of it to later columns. Below half a bit a weight nearly all of those are zero and undo nothing, so most symbols
buy less than they cost. Here every weight is decided by its whole effect, with all others as they are::

    G = E H          t_k = w^_k + G_k / H_kk          cost of z:  H_kk (t_k - w^(z))^2 / 2 + slope * bits(z)

and `G` follows every change. The rows of a matrix do not depend on each other, and only changes cost time, so this takes
a fraction of what feedback takes. It starts from zeros; the first sweeps have a higher slope, so that the symbols that buy
most are placed before others can take their share. Steps are `c / sqrt(H_kk)`: what is not undone counts whole.

Sources: rate-distortion optimised quantization of video coders, here with the true metric in place of an orthogonal
transform; Behdin et al., "QuantEase", arXiv:2309.01885, has the descent without rates. Omitted: dependent columns
(`bytecap.quantization.trellis`), which cost a bit a weight at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.coders import Shared
from bytecap.format.coders.classes import CENTRES, CLASSES, UNIT_CLASS
from bytecap.quantization import Shrink

SWEEPS = (4.0, 2.0, 1.0, 1.0)  # slopes of the sweeps, in units of the last one's
FINER = 0.5  # of a step of feedback, which has the same slope at half a bit a weight
_SIZES = 18  # symbols with a price of their own; larger ones cost as much as the last
_NO_TABLE = 64.0  # bits, where a class has no table
_FIRST_CLASS = UNIT_CLASS - 9  # of the first sweep
STEP_QUANTUM, SPREAD_QUANTUM = 4, 4
_PRIOR = 4.0  # symbols of size 1 that a row or column is given in advance
_SLOPE = 2 * math.log(2) / 12 / 2  # nats a bit costs at a step of 1 and high rate

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Descended:
    """A rounded matrix.

    Attributes:
        symbols: int32 (rows, cols).
        column_step, column_class: int (cols,); the step of column k is `c * 2^(column_step / 4)`.
        distortion: in the units of H, including row factors.
        centres: see `bytecap.quantization.Rounded`.
    """

    symbols: _Array
    column_step: _Array
    column_class: _Array
    distortion: float
    centres: npt.NDArray[np.float64]


def descend(weight: Tensor, hessian: Tensor, rows: Tensor, step: float, shrink: Shrink, shared: Shared) -> Descended:
    """Round one matrix.

    Args:
        weight: float32 (rows, cols).
        hessian: float32 (cols, cols).
        rows: float32 (rows,), weights of the rows' errors.
        step: `c`.
        shrink: reconstruction rules.
        shared: tables that price the symbols.
    """
    diagonal = hessian.diagonal()
    exponent = (torch.round(-2 * torch.log2(diagonal) / STEP_QUANTUM) * STEP_QUANTUM).to(torch.int32)
    scale = step * torch.exp2(exponent.float() / 4)
    gradient = (weight @ hessian).cpu()
    tables = shared.tables.cost_by_size[:, :_SIZES]
    price = np.where(np.isfinite(tables), tables, _NO_TABLE)
    slope = _SLOPE * step * step * float(rows.mean())
    values, symbols = torch.zeros(weight.shape), np.zeros(tuple(weight.shape), np.int32)
    arrays = [a.cpu().numpy() for a in (hessian, scale, rows, gradient, values)]
    column_class, steps = np.full(len(diagonal), _FIRST_CLASS, np.int32), exponent.cpu().numpy()
    for number, factor in enumerate(SWEEPS):
        if number:
            column_class = _classes(symbols, steps)
        centres = np.zeros((2, CLASSES * CENTRES))
        _sweep(*arrays, symbols, column_class, shrink.offset.reshape(-1), price, factor * slope, centres)
    cost = torch.linalg.vecdot((weight.cpu() - values).double(), gradient.double()) @ rows.cpu().double() / 2
    return Descended(
        symbols, steps, column_class, float(cost), centres.reshape(2, CLASSES, CENTRES)
    )


def _classes(symbols: _Array, steps: _Array) -> _Array:
    """Return classes of columns from the symbols (rows, cols) so far; with their steps they make even spreads."""
    energy = np.square(symbols, dtype=np.float32).sum(0)
    mean = max(float(energy.mean()), 2.0**-18 * len(symbols))
    spread = 2 * np.log2((energy + _PRIOR) / (mean + _PRIOR) * (mean / len(symbols))) + steps
    spread = np.round(spread / SPREAD_QUANTUM) * SPREAD_QUANTUM
    return (spread - steps + UNIT_CLASS).astype(np.int32).clip(1, CLASSES - 1)


def _over_rows(
    hessian: _Array, scale: _Array, row_weight: _Array, gradient: _Array, values: _Array, symbols: _Array,
    column_class: _Array, offset: _Array, price: _Array, slope: float, centres: _Array,
) -> None:  # fmt: skip
    """Decide every weight once, the last column first; `gradient`, `values` and `symbols` (rows, cols) follow."""
    rows, cols = values.shape
    last = price.shape[1] - 1
    for r in range(rows):
        g, v = gradient[r], values[r]
        for k in range(cols - 1, -1, -1):
            h, s = hessian[k, k], scale[k]
            u = (v[k] + g[k] / h) / s
            a = abs(u)
            cls = column_class[k]
            unit = h * s * s * row_weight[r] / 2
            least, z, found = unit * a * a + slope * price[cls, 0], 0, np.float32(0)
            low = int(np.floor(a))
            for m in range(max(1, low - 1), low + 2):
                point = m - offset[cls * CENTRES + min(m, CENTRES - 1)]
                cost = unit * (a - point) * (a - point) + slope * price[cls, min(m, last)]
                if cost < least:
                    least, z, found = cost, m, point
            if z:
                at = cls * CENTRES + min(z, CENTRES - 1)
                centres[0, at] += 1
                centres[1, at] += z - a
            new = found * s if u > 0 else -found * s
            change = new - v[k]
            symbols[r, k] = z if u > 0 else -z
            if change != 0:
                v[k] = new
                for j in range(cols):
                    g[j] -= change * hessian[k, j]


_sweep: Any = numba.njit(nogil=True, cache=True)(_over_rows)
