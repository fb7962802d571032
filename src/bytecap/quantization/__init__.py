"""Round matrices with waterfilled steps and error feedback, for the coders `grid` and `trellis`.

With `H = L L^T`, columns are rounded from last to first. What the columns done so far lack is fed back::

    Y_k = W_k + sum_{j>k} E_j L_jk / L_kk        E_j = W_j - W^_j
    step_k = c / L_kk                            every column costs c^2/12, whatever H is

which is reverse waterfilling at high rate (WaterSIC, arXiv:2603.04956; GPTQ is the special case of one step
per row). Each weight's reconstruction is its bin's centroid under the class of its column and row, so the
shrinkage that least squares asks for costs no side information; the *shrunk* value is what is fed back.

Two ways to round a column: every weight to its nearest point (`scalar`), or the column as a whole along the best
path through a trellis (`trellis`). Decoding needs none of this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.coders.classes import CENTRES, CLASSES, UNIT_CLASS, quarter
from bytecap.system.slabs import slabs

BLOCK = 64
_LARGE = 2**23  # weights from which symbols are kept in 16 bits
SAMPLE = 8  # one in so many columns is sampled for centroids


@dataclass(frozen=True)
class Shrink:
    """The reconstruction rules of every class.

    Attributes:
        offset: centroid of bin `z` is `|z| - offset[class, min(|z|, CENTRES - 1)]` steps, shape (64, CENTRES).
    """

    offset: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rounded:
    """The outcome for a batch of B matrices, in stored column order.

    Attributes:
        symbols: int (B, cols, rows); a tensor where they are still on a device.
        column_step: int (B, cols): the step of column k is `c * 2^(column_step / 4)`.
        column_class: int (B, cols).
        row_class: int (B, rows), added to the column's.
        distortion: float (B,), in the units of H, including row factors.
        centres: (2, 64, CENTRES): how many sampled values fell into a bin, and by how much it overstates them,
            summed, in steps.
    """

    symbols: npt.NDArray[np.integer] | Tensor
    column_step: npt.NDArray[np.integer]
    column_class: npt.NDArray[np.integer]
    row_class: npt.NDArray[np.integer]
    distortion: npt.NDArray[np.float64]
    centres: npt.NDArray[np.float64]

    @property
    def on_device(self) -> bool:
        """Return whether the symbols are a tensor."""
        return isinstance(self.symbols, Tensor)


@dataclass(frozen=True)
class RoundingProblem:
    """A batch of B equally shaped matrices to round.

    Attributes:
        weight: (B, cols, rows), float32, already divided by the rows' steps, columns in rounding order; rounding puts
            errors in its place.
        lower: (B, cols, cols), Cholesky factor.
        order: (B, cols), stored index of each column.
        rows: (B, rows), row weights of the distortion after the division by row steps.
        row_class: (B, rows), class offset of each row.
    """

    weight: Tensor
    lower: Tensor
    order: Tensor
    rows: Tensor
    row_class: Tensor


def column_steps(problem: RoundingProblem, step: Tensor, *, waterfill: bool) -> tuple[Tensor, Tensor]:
    """Return step exponents in quarter octaves, int32 (B, cols), and the steps, float32 (B, cols)."""
    ideal = -4 * torch.log2(problem.lower.diagonal(dim1=1, dim2=2))
    if not waterfill:
        ideal = ideal.mean(1, keepdim=True).expand_as(ideal)
    exponent = torch.round(ideal).to(torch.int32)
    return exponent, step[:, None] * torch.exp2(exponent.float() / 4)


def stored_order(
    problem: RoundingProblem,
    symbols: Tensor,
    exponent: Tensor,
    column_class: Tensor,
    distortion: Tensor,
    centres: Tensor,
) -> Rounded:
    """Put the outcome from rounding order into stored column order; `distortion` is twice the cost."""
    inverse = torch.argsort(problem.order, dim=1)
    found = (
        symbols.gather(1, inverse[:, :, None].expand(-1, -1, symbols.shape[2])), exponent.gather(1, inverse),
        column_class.gather(1, inverse), problem.row_class, distortion / 2, centres.reshape(2, CLASSES, CENTRES),
    )  # fmt: skip
    return Rounded(*(t.cpu().numpy() for t in found))


def step_fits(weight: Tensor, scale: Tensor) -> bool:
    """Return whether symbols surely fit 16 bits, feedback included."""
    return bool(torch.maximum(weight.amax(), -weight.amin()) * 16 < 32767 * scale.min())


def narrow(weight: Tensor, scale: Tensor) -> bool:
    """Return whether symbols of weights (B, cols, rows) are kept in 16 bits: of large matrices, where they fit."""
    return weight.numel() > _LARGE and step_fits(weight, scale)


def quarter_class(mean_square: Tensor) -> Tensor:
    """Return the class, 1..63, of a mean square in squared steps: quarter octaves of the standard deviation."""
    value = torch.round(2 * torch.log2(mean_square.clamp(min=1e-12))) + UNIT_CLASS
    return value.clamp_(1, CLASSES - 1).to(torch.int64)


def gaussian_shrink() -> Shrink:
    """Return the rules for Gaussian classes, a starting point that the model's own weights soon replace."""
    sigma = np.array([quarter(k - UNIT_CLASS) for k in range(CLASSES)])
    grid = np.linspace(0, CENTRES + 1, 256 * (CENTRES + 1) + 1)
    offset = np.zeros((CLASSES, CENTRES), np.float32)
    z = np.floor(grid + 0.5).astype(int)
    for k in range(1, CLASSES):
        density = np.exp(-0.5 * (grid / sigma[k]) ** 2)
        for m in range(1, CENTRES):
            inside = z == m
            mass = density[inside].sum()
            # bins so far out that nothing falls there keep the slope of the density's tail: half a step
            centre = float((grid[inside] * density[inside]).sum() / mass) if mass > 1e-200 else m - 0.5
            offset[k, m] = np.clip(m - centre, -0.5, 127 / 256)
    return Shrink((np.round(offset * 256) / 256).astype(np.float32))


def row_classes(weight: Tensor, lower: Tensor, step: Tensor, coarse: int) -> Tensor:
    """Return class offsets of rows (B, rows) from their energy in steps, with a mean of about 0.

    Args:
        weight: (B, cols, rows).
        lower: (B, cols, cols); column k has step `step / L_kk`.
        step: (B,).
        coarse: quarter octaves per code; 0 switches row classes off.
    """
    if coarse == 0:
        return torch.zeros(weight.shape[0], weight.shape[2], dtype=torch.int32, device=weight.device)
    diag = lower.diagonal(dim1=1, dim2=2)
    scale = (diag / step[:, None])[:, :, None]
    energy = torch.empty(weight.shape[0], weight.shape[2], device=weight.device)
    for part in slabs(weight.shape[2], weight.shape[0] * weight.shape[1]):
        energy[:, part] = (weight[:, :, part] * scale).square_().mean(1) + 1 / 12
    log = 2 * torch.log2(energy)
    log = log - log.mean(1, keepdim=True)
    return (torch.round(log / coarse) * coarse).clamp_(-40, 40).to(torch.int32)
