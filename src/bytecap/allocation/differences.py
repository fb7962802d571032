"""Matrices of an update: what is rounded is the difference to what the receiver already has.

A `DifferenceUnit` holds the difference of the model's weights to the decoded values of the base where a plain unit
holds weights, so rounding, search and trimming need not know of it. Most differences have a fraction of a bit a weight,
and are rounded by descent (`bytecap.quantization.descent`). The metric is the model's, and so are distortions: they are
those of the sum, since base and model stay as they are. A difference of which nothing is left costs no byte.

The target is the model, not what has changed in it: where the base's own rounding hurts, it is made up for, and where
it does not, no byte is spent on it. One slope decides (docs/updates.md has the measurements).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.coders import Shared
from bytecap.format.coders.classes import CLASSES
from bytecap.format.coders.grid import GridCode
from bytecap.quantization import Shrink
from bytecap.quantization.counted import counted
from bytecap.quantization.descent import Descended, descend, square
from bytecap.quantization.quantizer import Coded, Prepared, Sparse, rate

_FINER = 0.5  # of a step of feedback, which has the same slope at half a bit a weight
_FEW = 1.0  # bits a weight of a matrix up to which descent rounds it
_SPARSE = 0.45  # bits a weight of an update up to which descent rounds its matrices: better at 0.3, worse at 0.6


@dataclass(frozen=True, kw_only=True)
class DifferenceUnit(Prepared):
    """A unit of an update; its `weight` is the difference to `below`.

    Attributes:
        below: (rows, cols) float32, values that the unit has in the base.
        descent: whether it is rounded by descent where that takes few bits.
    """

    below: npt.NDArray[np.float32]
    descent: bool = True

    @property
    def target(self) -> Tensor:
        """See `Prepared`."""
        return self.weight + torch.from_numpy(self.below).to(self.weight.device)

    def sparse(self, step: float, shrink: Shrink, shared: Shared) -> Sparse | None:
        """See `Prepared`."""
        if not self.descent:
            return None
        hessian = square(self.lower.whole())
        found = descend(self.weight[:, self.order], hessian, self.rows.float(), _FINER * step, shrink, shared)
        coded = _coded(self, found, _FINER * step)
        return (coded, found.centres) if 8 * rate(coded, shared) < _FEW * self.unit.parameters else None

    def complete(self, coded: Coded, shared: Shared) -> Coded:
        """Let what was rounded stand on the base."""
        del shared
        return replace(coded, below=self.below)


def _coded(item: Prepared, found: Descended, step: float) -> Coded:
    """Return a unit rounded by descent as it would be stored; no column of it is dependent."""
    order = item.order.cpu().numpy()
    stored = [np.empty_like(a) for a in (found.column_step, found.column_class)]
    for into, a in zip(stored, (found.column_step, found.column_class), strict=True):
        into[order] = a
    turned = np.empty(item.shape[::-1], np.int32)
    turned[order] = found.symbols.T
    even = np.zeros(len(found.symbols), np.int32)
    symbols, counts = counted(turned, stored[1], even, CLASSES)
    code = GridCode(
        step=float(np.float32(step)), symbols=symbols, column_step=stored[0][None], column_class=stored[1][None],
        row_step=even, row_class=even,
    )  # fmt: skip
    return Coded(code, found.distortion, counts)


def is_sparse(budget: int, parameters: int) -> bool:
    """Return whether an update of so many bytes has few bits a weight.

    >>> is_sparse(260_669, 6_951_168), is_sparse(521_338, 6_951_168)
    (True, False)
    """
    return 8 * budget <= _SPARSE * parameters


def over(plain: Prepared, below: npt.NDArray[np.float32], *, descent: bool = True) -> DifferenceUnit:
    """Return a unit, prepared with the difference as its weight, on the base's values (rows, cols)."""
    held = {f.name: getattr(plain, f.name) for f in fields(Prepared)}
    return DifferenceUnit(**held, below=below, descent=descent)
