"""Round a matrix of few bits a weight by coordinate descent on what an error and a bit cost.

Error feedback (`bytecap.quantization`) decides on a weight by the error that no later column can undo, and leaves the
rest of it to later columns. Below a bit a weight nearly all of those are zero and undo nothing, so many symbols cost
more than they buy. Here every weight is decided by its whole effect, with all others as they are::

    G = E H         t_k = w^_k + G_k / H_kk         cost of z:  H_kk (t_k - w^(z))^2 / 2 + slope * bits(z)

and `G` follows every change. Rows do not depend on each other, and only changes cost time. The search starts from
zeros; its first sweeps have a higher slope, so that the symbols that buy most are placed before others take a share
of it. Steps are `c / sqrt(H_kk)`: what nobody undoes counts whole. Rows have neither steps nor spreads, and those of
columns are even numbers of quarter octaves, since at so few bits side information is much of a section.

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

_SWEEPS = (4.0, 2.0, 1.0, 1.0, 1.0)  # slopes of the sweeps, in units of the last one's
_QUANTUM = 2  # quarter octaves to which steps and spreads of columns are rounded
_PRIOR = 4.0  # symbols of size 1 that every column is given in advance
_FIRST_CLASS = UNIT_CLASS - 9  # of all columns in the first sweep: one weight in 25 is not 0
_SIZES = 18  # symbols with a price of their own; larger ones cost as much as the last
_LARGEST = 2**15 - 2
_NO_TABLE = 64.0  # bits of a symbol whose class has no table
_SLOPE = 2 * math.log(2) / 12 / 2  # what a bit buys at a step of 1 and high rate
_TOGETHER = 256  # columns of a product

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Descended:
    """A rounded matrix, its columns in the order in which they were given.

    Attributes:
        symbols: int32 (rows, cols).
        column_step: int32 (cols,): the step of column k is `c * 2^(column_step / 4)`.
        column_class: int32 (cols,).
        distortion: in the units of H, weights of rows included.
        centres: see `bytecap.quantization.Rounded`.
    """

    symbols: _Array
    column_step: _Array
    column_class: _Array
    distortion: float
    centres: npt.NDArray[np.float64]


def descend(weight: Tensor, hessian: Tensor, rows: Tensor, step: float, shrink: Shrink, shared: Shared) -> Descended:
    """Round one matrix, on the processor wherever it is.

    Args:
        weight: float32 (rows, cols).
        hessian: float32 (cols, cols).
        rows: float32 (rows,), weights of the rows' errors.
        step: `c`.
        shrink: reconstruction rules.
        shared: tables that price the symbols.
    """
    diagonal = hessian.diagonal()
    exponent = (torch.round(-2 * torch.log2(diagonal) / _QUANTUM) * _QUANTUM).to(torch.int32)
    scale = step * torch.exp2(exponent.float() / 4)
    gradient, values = (weight @ hessian).cpu(), torch.zeros(weight.shape)
    arrays = [a.cpu().numpy() for a in (hessian, scale, rows, gradient, values)]
    symbols, steps = np.zeros(tuple(weight.shape), np.int32), exponent.cpu().numpy()
    prices = shared.tables.cost_by_size[:, :_SIZES]
    prices = np.where(np.isfinite(prices), prices, _NO_TABLE)
    slope, offset = _SLOPE * step * step * float(rows.mean()), shrink.offset.reshape(-1)
    column_class, centres = np.full(len(steps), _FIRST_CLASS, np.int32), np.zeros((2, CLASSES * CENTRES))
    for number, factor in enumerate(_SWEEPS):
        if number:
            column_class = _classes(symbols, steps)
        centres[:] = 0
        _sweep(*arrays, symbols, column_class, offset, prices, factor * slope, centres)
    error = (weight.cpu() - values).double()
    cost = float((error * gradient).sum(1) @ rows.cpu().double()) / 2
    return Descended(symbols, steps, column_class, cost, centres.reshape(2, CLASSES, CENTRES))


def square(lower: Tensor) -> Tensor:
    """Return `L L^T` of a lower triangular factor, in a third of the operations of a whole product."""
    found = torch.zeros_like(lower)
    for at in range(0, len(lower), _TOGETHER):
        part = lower[at:, at : at + _TOGETHER]
        found[at:, at:].addmm_(part, part.T)
    return found


def _classes(symbols: _Array, steps: _Array) -> _Array:
    """Return classes (cols,) by the energy of the symbols (rows, cols) so far, which make even spreads."""
    energy = np.square(symbols, dtype=np.float32).sum(0)
    mean = max(float(energy.mean()), 2.0**-18 * len(symbols))
    spread = 2 * np.log2((energy + _PRIOR) / (mean + _PRIOR) * (mean / len(symbols))) + steps
    spread = np.round(spread / _QUANTUM) * _QUANTUM
    found: _Array = (spread - steps + UNIT_CLASS).astype(np.int32).clip(1, CLASSES - 1)
    return found


def _over_rows(
    hessian: _Array, scale: _Array, row_weight: _Array, gradient: _Array, values: _Array, symbols: _Array,
    column_class: _Array, offset: _Array, prices: _Array, slope: float, centres: _Array,
) -> None:  # fmt: skip
    """Decide on every weight once, the last column first; `gradient`, `values` and `symbols` (rows, cols) follow."""
    rows, cols = values.shape
    last = prices.shape[1] - 1
    for r in range(rows):
        g, v = gradient[r], values[r]
        for k in range(cols - 1, -1, -1):
            h, s, cls = hessian[k, k], scale[k], column_class[k]
            u = (v[k] + g[k] / h) / s
            a = abs(u)
            unit = h * s * s * row_weight[r] / 2
            least, z, found = unit * a * a + slope * prices[cls, 0], 0, np.float32(0)
            low = int(np.floor(min(a, np.float32(_LARGEST))))
            for m in range(max(1, low - 1), low + 2):
                point = np.float32(m) - offset[cls * CENTRES + min(m, CENTRES - 1)]
                cost = unit * (a - point) * (a - point) + slope * prices[cls, min(m, last)]
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
