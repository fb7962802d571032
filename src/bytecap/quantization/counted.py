"""Turn rounded symbols into stored order, in the smallest integers that hold them, and count them by class.

>>> symbols, counts = counted(np.array([[0, 3], [-1, 0]]), np.array([20, 20]), np.array([0, 1]), CLASSES)
>>> symbols.dtype, symbols.tolist(), counts[0, 20].tolist(), counts[0, 21].tolist()
(dtype('int8'), [[0, -1], [3, 0]], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0])
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.coders.classes import CLASSES, OCTAVE
from bytecap.format.entropy.frequencies import MAX_HALF
from bytecap.format.entropy.kernels import store
from bytecap.format.entropy.shared_tables import Counts
from bytecap.quantization.trial_values import classes_there
from bytecap.system.slabs import slabs


def _width(peak: int) -> str:
    """Return the smallest integer type of symbols up to a size."""
    return "int8" if peak < 2**7 else "int16" if peak < 2**15 else "int32"


def counted(
    symbols: npt.NDArray[Any], column: npt.NDArray[Any], row: npt.NDArray[Any], first: int
) -> tuple[npt.NDArray[Any], Counts]:
    """Return symbols (rows, cols), a byte each where they fit, and their counts.

    Args:
        symbols: (cols, rows).
        column: (cols,) classes.
        row: (rows,) classes.
        first: class of dependent columns.
    """
    peak = max(int(symbols.max()), -int(symbols.min())) if symbols.size else 0
    out = np.empty((len(row), len(column)), _width(peak))
    counts = np.zeros((2, CLASSES, min(peak, MAX_HALF + 1) + 1))
    fine = column >= first
    store(
        symbols, column.astype(np.int64), fine * OCTAVE, fine.astype(np.int64), row.astype(np.int64), out, counts
    )  # fmt: skip
    return out, counts


def counted_there(
    symbols: Tensor, column: npt.NDArray[Any], row: npt.NDArray[Any], first: int
) -> tuple[Tensor, Counts]:
    """Return what `counted` returns, computed on the device that holds the symbols, which stay there."""
    device = symbols.device
    peak = max(int(symbols.max()), -int(symbols.min())) if symbols.numel() else 0
    last = min(peak, MAX_HALF + 1)
    own = torch.from_numpy(column).to(device, torch.int64)[:, None]
    fine = (own >= first).long()
    rows = torch.from_numpy(row).to(device, torch.int64)
    counts = torch.zeros(2 * CLASSES * (last + 1), dtype=torch.int64, device=device)
    for part in slabs(*symbols.shape):
        cls = classes_there(own[part], rows, fine[part])
        cls.add_(fine[part] * CLASSES).mul_(last + 1).add_(symbols[part].abs().clamp_(max=last))
        counts += torch.bincount(cls.reshape(-1), minlength=len(counts))
    kind, shape = getattr(torch, _width(peak)), (len(row), len(column))
    try:
        out = torch.empty(shape, dtype=kind, device=device)
    except torch.OutOfMemoryError:
        out = torch.empty(shape, dtype=kind)
    for part in slabs(*out.shape):
        out[part] = symbols[:, part].T
    return out, counts.reshape(2, CLASSES, last + 1).double().cpu().numpy()
