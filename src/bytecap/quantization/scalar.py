"""Round every weight to its nearest point, batched over equally shaped matrices, on any torch device."""

from __future__ import annotations

import torch
from torch import Tensor

from bytecap.format.coders.classes import CENTRES, CLASSES
from bytecap.quantization import (
    BLOCK,
    SAMPLE,
    Rounded,
    RoundingProblem,
    Shrink,
    column_steps,
    quarter_class,
    step_fits,
    stored_order,
)


def round_scalar(problem: RoundingProblem, step: Tensor, shrink: Shrink, *, waterfill: bool = True) -> Rounded:
    """Round a batch at steps `c` of shape (B,); without `waterfill` all columns of a matrix share one step."""
    weight, lower = problem.weight, problem.lower
    batch, cols, rows = weight.shape
    device = weight.device
    diag = lower.diagonal(dim1=1, dim2=2)  # (B, cols)
    exponent, scale = column_steps(problem, step, waterfill=waterfill)
    offset = torch.from_numpy(shrink.offset).to(device).reshape(-1)
    whiten = torch.exp2(-problem.row_class.float() / 4)
    row_class = problem.row_class.long()
    error = weight  # a column's errors take the place of its weights
    symbols = torch.empty(
        batch, cols, rows, dtype=torch.int16 if step_fits(weight, scale) else torch.int32, device=device
    )
    column_class = torch.empty(batch, cols, dtype=torch.int32, device=device)
    distortion = torch.zeros(batch, dtype=torch.float64, device=device)
    centres = torch.zeros(2, CLASSES * CENTRES, dtype=torch.float64, device=device)
    for hi in range(cols, 0, -BLOCK):
        lo = max(0, hi - BLOCK)
        unit_lower = lower[:, lo:, lo:hi] / diag[:, None, lo:hi]  # columns divided by L_kk
        pending = torch.bmm(unit_lower[:, hi - lo :].transpose(1, 2), error[:, hi:]) if hi < cols else None
        for k in range(hi - 1, lo - 1, -1):
            y = weight[:, k]
            if pending is not None:
                y = y + pending[:, k - lo]
            if k + 1 < hi:
                y = y + torch.bmm(unit_lower[:, k + 1 - lo : hi - lo, k - lo].unsqueeze(1), error[:, k + 1 : hi])[:, 0]
            s = scale[:, k : k + 1]
            u = y / s
            column = quarter_class((u * whiten).square().mean(1))
            cls = (row_class + column[:, None]).clamp_(1, CLASSES - 1)
            size = u.abs()
            z = torch.floor(size + 0.5)
            index = cls * CENTRES + z.clamp(max=CENTRES - 1).long()
            value = z - offset[index]
            if k % SAMPLE == 0:
                centres[0] += torch.bincount(index.reshape(-1), minlength=CLASSES * CENTRES)
                centres[1] += torch.bincount(index.reshape(-1), (z - size).reshape(-1), minlength=CLASSES * CENTRES)
            sign = torch.sign(u)
            e = (u - sign * value).mul_(s)
            error[:, k] = e - y + weight[:, k]
            symbols[:, k] = (sign * z).to(symbols.dtype)
            column_class[:, k] = column
            distortion += ((e.square() * problem.rows).sum(1) * diag[:, k].square()).double()
    return stored_order(problem, symbols, exponent, column_class, distortion, centres)
