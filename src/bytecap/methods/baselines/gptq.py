"""Run GPTQ's loop over the columns of equally shaped matrices together, where a launch costs more than a column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 128  # columns that errors go to at once
TOGETHER = 2**28  # weights and Hessian entries of a batch


def feedback_together(
    weights: Sequence[Tensor], uppers: Sequence[Tensor], orders: Sequence[Tensor], steps: Tensor, most: float
) -> Tensor:
    """Round matrices of one shape, feeding every column's error back to the later ones.

    Args:
        weights: B matrices (rows, cols).
        uppers: factors (cols, cols) of `bytecap.methods.baselines.golf.Factor`, and their
        orders: (cols,).
        steps: float32 (B, rows).
        most: largest size of a code.

    Returns:
        Codes (B, rows, cols), float32.
    """
    upper, order = torch.stack(list(uppers)), torch.stack(list(orders))
    left = torch.stack([w.T[o] for w, o in zip(weights, order, strict=True)])  # (B, cols, rows)
    inverse = torch.where(steps > 0, 1 / steps, 0.0)
    codes = torch.empty_like(left)
    scale = 1 / upper.diagonal(dim1=1, dim2=2)
    cols = left.shape[1]
    for start in range(0, cols, BLOCK):
        stop = min(cols, start + BLOCK)
        errors = torch.empty_like(left[:, start:stop])
        for j in range(start, stop):
            codes[:, j] = torch.round(left[:, j] * inverse).clamp_(-most, most)
            error = torch.addcmul(left[:, j], codes[:, j], steps, value=-1).mul_(scale[:, j, None])
            errors[:, j - start] = error
            left[:, j + 1 : stop].sub_(upper[:, j, j + 1 : stop, None] * error[:, None])
        left[:, stop:].baddbmm_(upper[:, start:stop, stop:].transpose(1, 2), errors, alpha=-1)
    stored = torch.empty_like(codes)
    stored.scatter_(1, order[:, :, None].expand_as(codes), codes)
    return stored.transpose(1, 2)
