"""Round along the trellis on a CUDA device, with the programs of `bytecap.quantization.triton_programs`."""

from __future__ import annotations

import torch
from torch import Tensor

from bytecap.format.coders.classes import CENTRES, CLASSES, OCTAVE, UNIT_CLASS
from bytecap.format.coders.trellis import SHORT
from bytecap.quantization import BLOCK, SAMPLE, Rounded, RoundingProblem, Shrink, column_steps, narrow
from bytecap.quantization.triton_programs import round_columns
from bytecap.quantization.viterbi import masks_of

_WARM = 64  # rows by which a segment's search begins early: paths merge within five or six times the memory
_FIXED = 2**16  # parts of a step in sums for centroids


def round_trellis(
    problem: RoundingProblem, step: Tensor, shrink: Shrink, first: int, memory: int = SHORT, *, waterfill: bool = True
) -> Rounded:
    """See `bytecap.quantization.trellis.round_trellis`; symbols stay on the device, int16 or int32 (B, cols, rows)."""
    weight, lower = problem.weight, problem.lower
    batch, cols, rows = weight.shape
    device = weight.device
    diag = lower.diagonal(dim1=1, dim2=2)
    exponent, scale = column_steps(problem, step, waterfill=waterfill)
    segments, length = _cut(rows, memory)
    states = 1 << memory
    pairs, traced = (segments, segments * length) if memory == SHORT else (1, rows * states)
    low, high = torch.from_numpy(masks_of(memory)).to(device, torch.int32)
    error = weight  # a column's errors take the place of its weights
    kind = torch.int16 if narrow(weight, scale) else torch.int32
    symbols = torch.empty(batch, cols, rows, dtype=kind, device=device)
    column_class = torch.empty(batch, cols, dtype=torch.int32, device=device)
    cost = torch.empty(batch, cols, device=device)
    centres = torch.zeros(batch, 2, CLASSES * CENTRES, dtype=torch.int64, device=device)
    row_class = problem.row_class.to(torch.int32).contiguous()
    whiten = torch.exp2(-row_class.float() / 4)
    offset = torch.from_numpy(shrink.offset).to(device)
    scratch = (
        torch.empty(batch, rows, device=device), torch.empty(batch, pairs, 8, 8, device=device),
        torch.empty(batch, pairs, 8, dtype=torch.int32, device=device),
        torch.empty(batch, segments + 1, dtype=torch.int32, device=device),
        torch.empty(batch, traced, dtype=torch.uint8, device=device),
        torch.empty(batch, rows, dtype=torch.int32, device=device), low + 2 * high,
    )  # fmt: skip
    order, row_weight = problem.order.to(torch.int64).contiguous(), problem.rows.float().contiguous()
    for hi in range(cols, 0, -BLOCK):
        lo = max(0, hi - BLOCK)
        unit_lower = lower[:, lo:, lo:hi] / diag[:, None, lo:hi]  # columns divided by L_kk
        if hi < cols:
            fed = torch.bmm(unit_lower[:, hi - lo :].transpose(1, 2), error[:, hi:])
        else:
            fed = torch.zeros(batch, hi - lo, rows, device=device)
        inner = torch.zeros(batch, BLOCK, BLOCK, device=device)
        inner[:, : hi - lo, : hi - lo] = unit_lower[:, : hi - lo]
        round_columns[(batch,)](
            inner, fed, weight, error, scale, row_class, whiten, row_weight, offset, symbols, order, column_class,
            cost, centres, *scratch, lo, hi, cols, rows, first, length, SEGMENTS=segments, STATES=states,
            WARM=_WARM, **_SIZES,
        )  # fmt: skip
    distortion = (cost.double() * diag.double().square()).sum(1)
    found = centres.sum(0).double()
    found[1] /= _FIXED
    return Rounded(
        symbols, exponent.gather(1, torch.argsort(order, dim=1)).cpu().numpy(), column_class.cpu().numpy(),
        row_class.cpu().numpy(), (distortion / 2).cpu().numpy(), found.reshape(2, CLASSES, CENTRES).cpu().numpy(),
    )  # fmt: skip


def _cut(rows: int, memory: int) -> tuple[int, int]:
    """Cut a column; returns (segments, rows of each).

    With eight states a column takes 2 steps a segment and 3 a row, with more `_WARM` steps and 3 a row, but as many
    values for every segment as there are states. Few numbers of segments are used, since each one is compiled.
    """
    if memory > SHORT:
        segments = 16 if rows <= 1024 else 32 if rows <= 16384 else 64
    else:
        segments = 32 if rows <= 1024 else 128 if rows <= 16384 else 256
    return segments, -(-rows // segments)


_SIZES = {
    "BLOCK": BLOCK, "ROWS": 256, "CLASSES": CLASSES, "CENTRES": CENTRES, "UNIT": UNIT_CLASS, "OCTAVE": OCTAVE,
    "SAMPLE": SAMPLE, "FIXED": _FIXED, "num_warps": 8,
}  # fmt: skip
