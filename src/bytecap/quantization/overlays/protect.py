"""Choose protected weights, compute their values and store them, for all overlays that protect weights.

Which: scores in nats per token, from the error of a base. `owq` is the column score of OWQ (arXiv:2306.02272), which
takes columns as independent; `measured` is the exact fall of the distortion when a column (row, weight) alone is set
to its best. A base may not be known yet; then plain rounding to seven levels per row stands for it, as the coarse
bases are that such overlays are made for.

What they become: the values that absorb the others' errors, in closed form, then rounded one after the other so that
later ones absorb what the earlier lost. What is fed back are values as decoded.

Omitted: scores that change with what is already protected. One ranking serves a whole ladder.

>>> round_vector(torch.tensor([1.0, -0.3]), 8)[0].tolist()
[127, -38]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.coders import OverlayCoder, Shared
from bytecap.quantization.overlays import Applied, UnitProblem, decoded

Score = Literal["measured", "owq"]
_HALF_MAX = 65504.0
_CODE = 127
_LEVELS = 3  # a side, of the rounding that stands for an unknown base
_TINY = 1e-4  # what is left of the metric where weights are protected, in units of what is usual elsewhere


@dataclass(frozen=True)
class Amount:
    """The amount that an overlay protects, and its precision.

    Attributes:
        count: of columns, rows, channels or weights.
        bits: 16 or 8 for each value.
        mode: of `channels`; 0 elsewhere.
        order: numbers of columns (rows, ...) by falling worth; the first `count` are protected.
        stream: number of the stream whose channels they are, of `channels`; -1 elsewhere.
    """

    count: int
    bits: int
    mode: int = 0
    order: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False, compare=False)
    stream: int = -1

    @property
    def index(self) -> npt.NDArray[np.int64]:
        """The protected places, rising (count,)."""
        return np.sort(self.order[: self.count])


def ladder(order: Tensor, most: int, *, mode: int = 0) -> Iterator[Amount]:
    """Return amounts by rising bytes: powers of two up to `most`, with 8 and with 16 bits."""
    numbers, count = order.numpy().astype(np.int64), 1
    while count <= most:
        yield from (Amount(count, bits, mode, numbers) for bits in (8, 16))
        count *= 2


def nearest(weight: Tensor) -> Tensor:
    """Round to seven even levels up to the largest weight of each row, the base assumed where none is known."""
    step = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / _LEVELS
    return (weight / step).round() * step


def scores(problem: UnitProblem, base: Tensor | None = None, score: Score = "measured") -> Tensor:
    """Return the worth of protecting each weight alone, at its best value, in nats per token, (rows, cols) float64."""
    error = ((nearest(problem.weight) if base is None else base) - problem.weight).double()
    diagonal = problem.hessian.diagonal()
    weights = problem.rows[:, None] / 2
    if score == "owq":
        return weights * error**2 * diagonal
    return weights * (error @ problem.hessian) ** 2 / diagonal


def row_scores(problem: UnitProblem, base: Tensor | None = None, score: Score = "measured") -> Tensor:
    """Return the worth of every row (rows,), which is its distortion, since rows do not touch each other."""
    error = ((nearest(problem.weight) if base is None else base) - problem.weight).double()
    metric = torch.diag(problem.hessian.diagonal()) if score == "owq" else problem.hessian
    return ((error @ metric) * error).sum(1) * problem.rows / 2


def without_columns(problem: UnitProblem, index: npt.NDArray[np.int64]) -> UnitProblem:
    """Return the problem in which the columns `index` are free to absorb the errors of the others.

    Their weights are 0. With S the protected and R the other columns, the least cost of an error E_R is measured by
    the Schur complement H_RR - H_RS H_SS^-1 H_SR; S keeps a tiny diagonal, so that the matrix stays positive definite.
    """
    chosen = torch.from_numpy(index)
    hessian, weight = problem.hessian, problem.weight.clone()
    weight[:, chosen] = 0
    factor = torch.linalg.cholesky(hessian[chosen][:, chosen])
    across = torch.linalg.solve_triangular(factor, hessian[chosen], upper=False)  # (k, cols)
    schur = hessian - across.T @ across
    schur = (schur + schur.T) / 2
    others = np.delete(np.arange(len(schur)), index)
    usual = schur.diagonal()[torch.from_numpy(others)].median() if len(others) else 1.0
    schur[chosen] = 0
    schur[:, chosen] = 0
    schur[chosen, chosen] = _TINY * usual
    return UnitProblem(problem.unit, weight, schur, problem.rows)


def without_rows(problem: UnitProblem, index: npt.NDArray[np.int64]) -> UnitProblem:
    """Return the problem in which the rows `index` cost next to nothing.

    The mean of `rows` stays 1; its change goes into H.
    """
    chosen = torch.from_numpy(index)
    weight, rows = problem.weight.clone(), problem.rows.clone()
    weight[chosen] = 0
    rows[chosen] *= _TINY
    mean = rows.mean()
    return UnitProblem(problem.unit, weight, problem.hessian * mean, rows / mean)


def absorbed(problem: UnitProblem, base: Tensor, index: npt.NDArray[np.int64]) -> Tensor:
    """Return the best protected columns (k, rows) float64: W_S - E_R H_RS H_SS^-1, where E is the base's error."""
    chosen = torch.from_numpy(index)
    error = (base - problem.weight).double()
    error[:, chosen] = 0
    factor = torch.linalg.cholesky(problem.hessian[chosen][:, chosen])
    pull = torch.cholesky_solve((error @ problem.hessian[:, chosen]).T, factor)
    return problem.weight[:, chosen].T.double() - pull


@dataclass(frozen=True)
class Stored:
    """Vectors in the form in which an overlay stores them.

    Attributes:
        values: float16 or int8 (k, n).
        scales: float16 (k,) of int8 values, else none.
    """

    values: npt.NDArray[Any]
    scales: npt.NDArray[np.float16] | None


def round_vector(vector: Tensor, bits: int) -> tuple[npt.NDArray[Any], np.float16, Tensor]:
    """Round one vector (n,); returns (float16 or int8 values, scale, values as decoded)."""
    if bits == 16:
        half = vector.clamp(-_HALF_MAX, _HALF_MAX).numpy().astype(np.float16)
        return half, np.float16(1), torch.from_numpy(half.astype(np.float64))
    largest = min(float(vector.abs().max()) if len(vector) else 0.0, _CODE * _HALF_MAX)
    scale = np.float16(largest / _CODE)
    if float(scale) * _CODE < largest:
        scale = np.nextafter(scale, np.float16(_HALF_MAX))
    codes = (vector / max(float(scale), 1e-30)).round().clamp(-_CODE, _CODE)
    return codes.numpy().astype(np.int8), scale, codes * float(scale)


def store(vectors: Tensor, bits: int, metric: Tensor | None = None) -> Stored:
    """Round vectors (k, n) to f16 or to i8 with a scale each.

    Args:
        vectors: wanted values.
        bits: 16 or 8.
        metric: (k, k) positive definite; given, a vector's error is absorbed by those after it (GPTQ's recursion).
    """
    left, kept = vectors.double().clone(), []
    upper = None
    if metric is not None and len(left) > 1:
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(metric)), upper=True)
    for i in range(len(left)):
        values, scale, as_decoded = round_vector(left[i], bits)
        kept.append((values, scale))
        if upper is not None:
            left[i + 1 :] -= upper[i, i + 1 :, None] * ((left[i] - as_decoded) / upper[i, i])
    stacked = np.stack([v for v, _ in kept]) if kept else np.zeros(left.shape, np.float16 if bits == 16 else np.int8)
    return Stored(stacked, None if bits == 16 else np.array([s for _, s in kept], np.float16))


class _Encoder(OverlayCoder, Protocol):
    """An overlay's coder that writes places, values and their scales."""

    def encode(
        self, index: npt.NDArray[np.int64], values: npt.NDArray[Any], size: int,
        scales: npt.NDArray[np.float16] | None, /,
    ) -> bytes: ...  # fmt: skip


def protected(overlay: _Encoder, index: npt.NDArray[np.int64], stored: Stored, places: int, base: Tensor) -> Applied:
    """Encode protected vectors or weights and apply them to a base.

    Args:
        overlay: reader and writer of the overlay.
        index: protected places, rising (k,).
        stored: their values.
        places: how many there are to choose from.
        base: (rows, cols) as decoded.
    """
    data = overlay.encode(index, stored.values, places, stored.scales)
    return apply(overlay, data, base, len(index) / places)


def apply(overlay: OverlayCoder, data: bytes, base: Tensor, share: float) -> Applied:
    """Apply an overlay to a base by the overlay's own decoder."""
    matrix = np.array(base.numpy(), np.float32, order="C")
    shape = (matrix.shape[0], matrix.shape[1])
    side = sum(n for kind, n in overlay.kinds(data, shape, "F32") if kind in {"index", "side"})
    return Applied(overlay.tag, data, decoded(overlay.apply(data, matrix, Shared())), side, share)
