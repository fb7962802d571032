"""GPTQ's loop rounds columns one after another, and feeds the error of each back to those that are not rounded yet.

Matrices of one shape go through it together, where a launch costs more than a column.

Source: Frantar et al., GPTQ (arXiv:2210.17323). Inputs that calibration never saw keep their weights here.

>>> weight, factor = torch.tensor([[0.9, -0.2], [0.1, 0.7]]), factorize(torch.eye(2, dtype=torch.float64))
>>> most = torch.tensor(9.0)
>>> feedback(weight, factor, torch.tensor([0.5, 0.1]), -most, most)[0].tolist()
[[2.0, -0.0], [1.0, 7.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
_BLOCK = 128  # columns that errors go to at once


@dataclass(frozen=True)
class Factor:
    """The factors of a Hessian that GPTQ needs, or of several equally large ones, along a first dimension.

    Attributes:
        upper: float32 (..., cols, cols), upper triangular U with U^T U = (H + damping)^-1, columns in rounding order.
        order: (..., cols), stored index of each column.
    """

    upper: Tensor
    order: Tensor

    @classmethod
    def stacked(cls, factors: Sequence[Factor]) -> Factor:
        """Return several factors as one."""
        return cls(torch.stack([f.upper for f in factors]), torch.stack([f.order for f in factors]))


def factorize(hessian: Tensor, damping: float = DAMPING, last: Sequence[int] = ()) -> Factor:
    """Factor the inverse of a damped Hessian, columns by falling diagonal ("act-order").

    Args:
        hessian: float64 (cols, cols), second moments of the layer's inputs, of any scale.
        damping: added to the diagonal, as a fraction of its mean.
        last: columns that come behind all others, whatever their diagonal.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    late = torch.zeros(len(hessian), device=hessian.device)
    late[list(last)] = 1
    order = torch.argsort(diagonal, descending=True, stable=True)
    order = order[torch.argsort(late[order], stable=True)]
    if not mean > 0:  # no input was ever seen: without feedback, this is round to nearest
        return Factor(torch.eye(len(hessian), device=hessian.device), order)
    damped = (hessian.double() / mean)[order][:, order]
    damped.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return Factor(torch.linalg.cholesky(inverse, upper=True).float(), order)


def reciprocal(step: Tensor) -> Tensor:
    """Return 1 / step, and 0 where a step is 0."""
    return torch.where(step > 0, 1 / step, 0.0)


def feedback(
    weight: Tensor, factor: Factor, step: Tensor, low: Tensor, high: Tensor, kept: int = 0
) -> tuple[Tensor, Tensor]:
    """Run GPTQ's loop over columns in the factor's order, for one matrix or several of one shape.

    With U from `factor`, column j's error `e = (w_j - q_j) / U_jj` is taken off the later columns as `e U_jk`:
    inside a block of columns at once, beyond it in one matrix product per block.

    Args:
        weight: (rows, cols), or (matrices, rows, cols), and all others likewise.
        factor: of the layer's Hessian.
        step: float32 (rows,).
        low: smallest code, () or (rows,).
        high: largest code, () or (rows,).
        kept: columns at the end of the order that are not rounded and so only absorb the others' errors.

    Returns:
        Codes (rows, cols), those of kept columns without meaning, and the kept columns (rows, kept) in that order.
    """
    upper, order = factor.upper, factor.order[..., None]
    inverse = reciprocal(step)
    left = torch.take_along_dim(weight.mT, order, -2).contiguous()  # (..., cols, rows): columns are contiguous
    codes = torch.empty_like(left)
    cols = left.shape[-2] - kept
    scale = (1 / upper.diagonal(dim1=-2, dim2=-1))[..., None]
    for start in range(0, cols, _BLOCK):
        stop = min(cols, start + _BLOCK)
        errors = torch.empty_like(left[..., start:stop, :])
        for j in range(start, stop):
            column = left.select(-2, j)
            code = torch.round(column * inverse).clamp_(low, high)
            error = torch.addcmul(column, code, step, value=-1).mul_(scale.select(-2, j))
            codes.select(-2, j).copy_(code)
            errors.select(-2, j - start).copy_(error)
            _subtract_outer(left[..., j + 1 : stop, :], upper[..., j, j + 1 : stop], error)
        _subtract_product(left[..., stop:, :], upper[..., start:stop, stop:].mT, errors)
    stored = torch.empty_like(codes).scatter_(-2, order.expand_as(codes), codes)
    return stored.mT, left[..., cols:, :].mT


def _subtract_outer(target: Tensor, one: Tensor, two: Tensor) -> None:
    """Subtract the outer product of two vectors; without a copy where there is a single pair."""
    if target.ndim == 2:
        target.addr_(one, two, alpha=-1)
    else:
        target.sub_(one[..., None] * two[..., None, :])


def _subtract_product(target: Tensor, one: Tensor, two: Tensor) -> None:
    (target.addmm_ if target.ndim == 2 else target.baddbmm_)(one, two, alpha=-1)
