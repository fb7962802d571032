"""Decode a trial's values on the device that rounded them, bit for bit as a reader decodes the file.

Every operation is a float32 product or difference of its own, in the format's order (`bytecap.format.coders.grid`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.coders.classes import CENTRES, CLASSES, OCTAVE, quarter
from bytecap.format.coders.grid import GridCode
from bytecap.quantization.symbols_there import symbols_anywhere

_TOGETHER = 2**24  # values at a time


def classes_there(columns: Tensor, rows: Tensor, fine: Tensor) -> Tensor:
    """Compute `weight_classes` of the coder `grid` for integer tensors that broadcast to the weights' shape."""
    more = fine * OCTAVE
    return torch.maximum((columns + more + rows).clamp_(max=CLASSES - 1), 1 + more)


def values_there(code: GridCode, offset: npt.NDArray[np.float32], device: torch.device) -> Tensor:
    """Decode float32 values (rows, cols).

    Args:
        code: what would be stored, its rows in one group.
        offset: reconstruction offsets by class and |z|, (64, 17).
        device: where to.
    """

    def sent(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    symbols, flat = symbols_anywhere(code), sent(offset).reshape(-1)
    out = torch.empty(symbols.shape, device=device)
    scale = sent(np.float32(code.step) * quarter(code.column_step))  # (1, cols), as all that belongs to columns
    fine = sent(code.fine).int()
    half = torch.where(fine > 0, 0.5, 1.0)
    column_class, row_class = sent(code.column_class.astype(np.int32)), sent(code.row_class.astype(np.int32))
    row_step = sent(quarter(code.row_step))
    high = max(1, _TOGETHER // max(1, symbols.shape[1]))
    for at in range(0, len(symbols), high):
        part = slice(at, at + high)
        cls = classes_there(column_class, row_class[part, None], fine)
        points = symbols[part].to(device).int()
        size = points.abs()
        cls.mul_(CENTRES).add_(size.clamp(max=CENTRES - 1))
        value = out[part]
        value.copy_(size).mul_(half).sub_(flat[cls])
        torch.where(points < 0, -value, value, out=value)
        value.mul_(row_step[part, None]).mul_(scale)
    return out
