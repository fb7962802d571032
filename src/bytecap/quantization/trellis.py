"""Round a column as a whole, by dependent quantization along a trellis down its rows.

The fine grid has half a column's step. Its points fall into four subsets by their value modulo 4; in every state only
two subsets may follow, so a path says one bit a weight and the points it may use are twice as far apart as the
grid's. `bytecap.quantization.viterbi` finds the path of least squared error. At high rate eight states are worth 0.18
bit a weight against a scalar grid at equal distortion, and 256 states 0.22, of the 0.25 bit that separate a scalar grid
from the rate-distortion bound. Columns of lower spread are rounded point by point: a path costs a bit even where
nothing is to say.

Sources: Marcellin & Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources", 1990; the trellis
of eight states and the union of subsets are those of JPEG 2000 part 2. Feedback between columns is that of
`bytecap.quantization`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.coders.classes import CENTRES, CLASSES, OCTAVE, UNIT_CLASS
from bytecap.format.coders.trellis import SHORT
from bytecap.quantization import BLOCK, SAMPLE, Rounded, RoundingProblem, Shrink, column_steps, narrow
from bytecap.quantization.viterbi import decisions, masks_of, search
from bytecap.system.threads import in_threads

_Array = npt.NDArray[Any]


def round_trellis(
    problem: RoundingProblem, step: Tensor, shrink: Shrink, first: int, memory: int = SHORT, *, waterfill: bool = True
) -> Rounded:
    """Round a batch at steps `c` of shape (B,); columns of class `first` and above along the trellis.

    States have `memory` bits, 3 to 8.

    Runs on the processor's cores, one matrix each, whatever device the problem is on.
    """
    p = RoundingProblem(
        *(t.cpu() for t in (problem.weight, problem.lower, problem.order, problem.rows, problem.row_class))
    )
    weight, lower = p.weight, p.lower
    batch, cols, rows = weight.shape
    diag = lower.diagonal(dim1=1, dim2=2)  # (B, cols)
    exponent, scale = column_steps(p, step.cpu(), waterfill=waterfill)
    error = weight  # a column's errors take the place of its weights
    symbols = np.empty((batch, cols, rows), np.int16 if narrow(weight, scale) else np.int32)  # in stored column order
    column_class = np.empty((batch, cols), np.int32)
    distortion = np.zeros(batch)
    centres = np.zeros((batch, 2, CLASSES * CENTRES))
    whiten = torch.exp2(-p.row_class.float() / 4).numpy()
    fixed = shrink.offset.reshape(-1), first, masks_of(memory)
    arrays = weight.numpy(), error.numpy(), scale.numpy(), p.row_class.numpy(), whiten, p.rows.float().numpy()
    weights2, order = diag.square().numpy(), p.order.numpy()
    for hi in range(cols, 0, -BLOCK):
        lo = max(0, hi - BLOCK)
        unit_lower = lower[:, lo:, lo:hi] / diag[:, None, lo:hi]  # columns divided by L_kk
        pending = torch.zeros(batch, hi - lo, rows)
        if hi < cols and bool(unit_lower[:, hi - lo :].any()):  # no feedback: nothing to add up
            torch.bmm(unit_lower[:, hi - lo :].transpose(1, 2), error[:, hi:], out=pending)
        inner, fed = unit_lower[:, : hi - lo].contiguous().numpy(), pending.numpy()

        def one(b: int, lo: int = lo, hi: int = hi, inner: _Array = inner, fed: _Array = fed) -> None:
            room = decisions(rows, memory)
            _block(
                lo, hi, inner[b], fed[b], *(a[b] for a in arrays), weights2[b], *fixed, room, symbols[b], order[b],
                column_class[b], distortion[b : b + 1], centres[b],
            )  # fmt: skip

        in_threads(one, range(batch))
    return Rounded(
        symbols, np.take_along_axis(exponent.numpy(), np.argsort(order), 1), column_class, p.row_class.numpy(),
        distortion / 2, centres.sum(0).reshape(2, CLASSES, CENTRES),
    )  # fmt: skip


def _round_columns(
    lo: int, hi: int, inner: _Array, fed: _Array, weight: _Array, error: _Array, scale: _Array, row_class: _Array,
    whiten: _Array, row_weight: _Array, diag2: _Array, offset: _Array, first: int, masks: _Array, came: _Array,
    symbols: _Array, order: _Array, column_class: _Array, distortion: _Array, centres: _Array,
) -> None:  # fmt: skip
    """Round columns lo..hi-1 of one matrix, last first; arrays are (cols, rows), (cols,) or (rows,).

    Column k of the problem is column `order[k]` of what is stored: of `symbols` and `column_class`.
    """
    rows = weight.shape[1]
    u = np.empty(rows, np.float32)
    cls = np.empty(rows, np.int32)
    v = np.empty(rows, np.int32)
    for k in range(hi - 1, lo - 1, -1):
        y = fed[k - lo]
        y += weight[k]
        for j in range(k + 1, hi):
            if inner[j - lo, k - lo] != 0:
                y += inner[j - lo, k - lo] * error[j]
        energy = 0.0
        for r in range(rows):
            x = y[r] / scale[k] * whiten[r]
            energy += x * x
        column = round(2 * np.log2(max(energy / rows, 1e-12))) + UNIT_CLASS
        column = min(max(column, 1), CLASSES - 1)
        column_class[order[k]] = column
        fine = column >= first
        s = scale[k] * np.float32(0.5) if fine else scale[k]
        unit = np.float32(2) if fine else np.float32(1)  # offsets are in steps of the column
        for r in range(rows):
            u[r] = y[r] / s
            c = min(max(column + row_class[r], 1), CLASSES - 1)
            cls[r] = min(c + OCTAVE, CLASSES - 1) if fine else c
        if fine:
            search(u, row_weight, masks, came, v)
        else:
            for r in range(rows):
                z = int(np.floor(abs(u[r]) + np.float32(0.5)))
                v[r] = z if u[r] > 0 else -z
        for r in range(rows):
            size = abs(v[r])
            at = cls[r] * CENTRES + min(size, CENTRES - 1)
            value = size - unit * offset[at]
            sign = 1 if v[r] > 0 else -1
            e = (u[r] - sign * value) * s
            distortion[0] += np.float64(e) * e * row_weight[r] * diag2[k]
            error[k, r] = e - y[r] + weight[k, r]
            if k % SAMPLE == 0:
                centres[0, at] += 1
                centres[1, at] += (size - sign * u[r]) / unit
        symbols[order[k]] = v


_block: Any = numba.njit(nogil=True, cache=True)(_round_columns)
