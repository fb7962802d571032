"""A matrix into a block format under its metric.

>>> from bytecap.runtimes.blocks.ggml import FORMATS
>>> weight = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
>>> found = encode(weight, prepare(torch.eye(32)), FORMATS["Q8_0"])
>>> bool(np.abs(found.values() - weight).max() < 0.005)
True
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.errors import UsageError
from bytecap.runtimes.blocks import BlockFormat, Codes, FloatArray
from bytecap.runtimes.blocks.code_search import SWEEPS, CodeSearch, search_of
from bytecap.runtimes.blocks.lattice_tables import factors_of, tables
from bytecap.runtimes.blocks.powers import UNSIGNED, made_positive

_STEPS = 10  # candidates for a sub-block's scale
_FINE = (1.0, 0.99, 1.01, 0.98)  # candidates for the float16 of a block with fine sub-scales
_COARSE = (1.0, 0.93, 1.07, 0.86, 1.14)
_FLOATS = {
    "F16": (65504.0, 11, -13),
    "BF16": (3.3895e38, 8, -125),
    "E8M0": (2.0**127, 1, -127),
    "E4M3": (448 * 2.0**-9, 4, -14),  # divided by 2^9: levels are halves, and the matrix's own scale is 2^8
}  # largest, digits, least exponent
_RIDGE = 1e-6  # of the mean diagonal, where a Hessian does not factor


@dataclass(frozen=True)
class Form:
    """A Hessian as rounding wants it.

    Attributes:
        hessian: float32 (cols, cols), mean diagonal 1.
        fed: float32 (cols, cols), `L_jk / L_kk` at (k, j).
        weight: float32 (cols,), `L_kk^2`.
    """

    hessian: FloatArray
    fed: FloatArray
    weight: FloatArray


class Shrinkage(NamedTuple):
    """How far a Hessian is drawn to what few tokens know well: its diagonal, and the mean of that.

    Few tokens overstate how far columns can make up for each other. The mean (a multiple of the identity) helps more
    where columns are alike, the diagonal where a few are much larger.
    """

    diagonal: float = 0.0
    mean: float = 0.0


def shrunk(hessian: Tensor, by: Shrinkage) -> Tensor:
    """`(1 - d - m) H + d diag(H) + m mean(diag(H)) I` of a Hessian (cols, cols); `d`, `m`: `s / (1 + s)` of `by`."""
    d, m = (s / (1 + s) for s in by)
    diagonal = hessian.diagonal()
    found = hessian * (1 - d - m)
    found.diagonal().copy_((1 - m) * diagonal + m * diagonal.mean())
    return found


@dataclass(frozen=True)
class Factors:
    """The contents of a `Form` as tensors on the device of the Hessian.

    Attributes:
        hessian, fed, weight: see `Form`.
        order: column at each place, int64 (cols,), or None where columns stand as in the matrix.
    """

    hessian: Tensor
    fed: Tensor
    weight: Tensor
    order: Tensor | None = None

    def form(self) -> Form:
        """As arrays."""
        return Form(*(t.cpu().contiguous().numpy() for t in (self.hessian, self.fed, self.weight)))


def factor(hessian: Tensor, within: int = 0) -> Factors:
    """Factor a Hessian, symmetric and not negative; zeros are taken as the identity.

    Args:
        hessian: (cols, cols).
        within: spans of so many columns are sorted, so that a column that the others tell least about is coded first
            and all others are still free to make up for it; 0 leaves them.
    """
    h = hessian.double()
    mean = float(h.diagonal().mean())
    h = h / mean if mean > 0 else torch.eye(len(h), dtype=torch.float64, device=h.device)
    damped, lower = _cholesky(h)
    order = None
    if within:
        alone = 1 / torch.cholesky_inverse(lower).diagonal()
        starts = torch.arange(0, len(h), within, device=h.device)[:, None]
        order = (starts + alone.reshape(-1, within).argsort(stable=True)).flatten()
        damped, lower = _cholesky(h[order][:, order])
    diagonal = lower.diagonal()
    fed = (lower / diagonal).T.contiguous()
    return Factors(damped.float(), fed.float(), diagonal.square().float(), order)


def _cholesky(h: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix with as little more on its diagonal as it takes to factor it, and the factor."""
    ridge = _RIDGE
    while True:
        damped = h.clone()
        damped.diagonal().add_(ridge)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return damped, lower
        ridge *= 10


def prepare(hessian: Tensor) -> Form:
    """A Hessian (cols, cols), symmetric and not negative, as rounding wants it; zeros are taken as the identity."""
    return factor(hessian).form()


@cache
def _tables(form: BlockFormat) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Nearest levels at every half step, candidates for sub-blocks' scales, and for blocks' scales."""
    table = np.zeros(0, np.float32)
    if form.levels:
        levels = np.array(form.levels, np.float32)
        middles = (levels[1:] + levels[:-1]) / 2
        places = np.arange(2 * (form.high - form.low) + 1) / 2 + form.low
        table = levels[np.searchsorted(middles, places, side="right")]
    if form.minimums:
        first, width = 1.06, 0.5 if form.high <= 3 else 0.35 if form.high <= 15 else 0.2
    elif form.float_type == "E4M3":  # the largest value may take the last level but one: few levels are up there
        first, width = 1.6, 0.8
    elif form.levels:
        first, width = 1.08, 0.5
    else:
        first, width = (
            (1.0, 0.75)
            if form.low == -1
            else (1.08, 0.62)
            if form.low >= -8
            else (1.06, 0.36)
            if form.low >= -32
            else (1.04, 0.1)
        )
    factors = np.linspace(first, first - width, _STEPS, dtype=np.float32)
    tries = np.array(_COARSE if form.scales[1] <= 31 else _FINE, np.float32)
    return table, factors, tries


def encode(
    weight: npt.NDArray[np.float32], form: Form, layout: BlockFormat, *, sweeps: int = SWEEPS, width: int | None = None,
    trials: Sequence[float] = (1.0,), threads: int | None = None,
) -> Codes:  # fmt: skip
    """Codes of a matrix (rows, cols); the same for any number of threads.

    Args:
        weight: finite values.
        form: of its Hessian, see `prepare`.
        layout: the block format.
        sweeps: of coordinate descent after error feedback.
        width: ways to round a row's columns that are kept side by side (`bytecap.runtimes.blocks.beam`);
            as many as pay if None.
        trials: factors of a block's scale that are tried.
        threads: as many as torch may use if None.

    Raises:
        UsageError: the columns are no whole blocks, or a value is not finite.
    """
    from bytecap.runtimes.blocks.kernel import encode_lanes
    from bytecap.runtimes.blocks.search import LANES

    rows, cols = weight.shape
    found = Codes.empty(layout, rows, cols)
    peak = float(np.abs(weight).max(initial=0.0))
    if not np.isfinite(peak):
        raise UsageError("a weight is not finite")
    if layout.vector:
        return _vectors(weight, peak, form, found, sweeps, threads)
    unit = 2.0 ** np.ceil(np.log2(peak)) if peak > 0 else 1.0
    table, factors, tries = _tables(layout)
    size = layout.block
    tiles = np.stack([form.hessian[i : i + size, i : i + size] for i in range(0, cols, size)])
    n = layout.sub
    sums = np.array([form.hessian[i : i + n, i : i + n].sum() for i in range(0, cols, n)], np.float32)
    inv = 1 / form.hessian.diagonal()
    signs = 2 if not layout.minimums and layout.low != -layout.high else 1
    fixed = (
        size, layout.sub, np.float32(layout.low), np.float32(layout.high), table, layout.scales, layout.minimums,
        (float(unit), *_FLOATS[layout.float_type]),
        factors, tries, signs, width or search_of(layout).width, np.array(trials, np.float32), sweeps,
    )  # fmt: skip

    def one(at: int) -> None:
        part = found.part(slice(at, at + LANES))
        count = len(part.codes)
        w = np.zeros((cols, LANES), np.float32)
        w[:, :count] = (weight[at : at + LANES] / unit).T
        q, ls, m, d, dm = (np.zeros((n, LANES), np.float32) for n in _lengths(layout, cols))
        encode_lanes(w, form.fed, form.weight, form.hessian, tiles, inv, sums, *fixed, q, ls, m, d, dm)
        for out, array in zip((part.codes, part.sub_scales, part.sub_minimums), (q, ls, m), strict=True):
            out[:] = array[:, :count].T.astype(out.dtype)
        part.scale[:] = (d[:, :count].T.astype(np.float64) * unit).astype(part.scale.dtype)
        part.minimum[:] = (dm[:, :count].T.astype(np.float64) * unit).astype(part.scale.dtype)

    with ThreadPoolExecutor(threads or torch.get_num_threads()) as pool:
        list(pool.map(one, range(0, rows, LANES)))
    if layout.float_type in UNSIGNED:
        made_positive(found, UNSIGNED[layout.float_type])
    return found


def _vectors(
    weight: FloatArray, peak: float, form: Form, found: Codes, sweeps: int, threads: int | None
) -> Codes:  # fmt: skip
    """`encode` for codes that are vectors of a table."""
    from bytecap.runtimes.blocks.lattice_kernel import encode_vectors
    from bytecap.runtimes.blocks.search import LANES

    layout, (rows, cols) = found.format, weight.shape
    fixed = tables(layout)
    blocks = factors_of(form.hessian, form.fed, form.weight, layout)
    unit = 2.0 ** np.ceil(np.log2(peak)) if peak > 0 else 1.0
    stored = unit / layout.unit  # of a scale
    grid = (float(stored), *_FLOATS[layout.float_type])

    def one(at: int) -> None:
        part = found.part(slice(at, at + LANES))
        count = len(part.codes)
        w = np.zeros((cols, LANES), np.float32)
        w[:, :count] = (weight[at : at + LANES] / unit).T
        q, ls, d = (np.zeros((cols // n, LANES), np.float32) for n in (1, layout.sub, layout.block))
        encode_vectors(w, form.fed, form.weight, form.hessian, *blocks, *fixed[:5], grid, *fixed[5:], sweeps, q, ls, d)
        part.codes[:] = q[:, :count].T.astype(np.int8)
        part.sub_scales[:] = ls[:, :count].T.astype(np.int8)
        part.scale[:] = (d[:, :count].T.astype(np.float64) * stored).astype(part.scale.dtype)

    with ThreadPoolExecutor(threads or torch.get_num_threads()) as pool:
        list(pool.map(one, range(0, rows, LANES)))
    return found


def encode_all(
    weights: Sequence[FloatArray], factors: Sequence[Factors], layout: BlockFormat, *, thorough: bool = False
) -> list[tuple[Codes, Tensor]]:
    """Codes and decoded values (rows, cols) of matrices of one shape, on the device that their factors are on.

    On a CUDA device with triton the matrices go side by side, and the values stay there. The processor does what the
    device has no programs for. `thorough` is that of `search_of`.
    """
    orders = [None if f.order is None else np.asarray(f.order.cpu()) for f in factors]
    moved = [w if o is None else np.ascontiguousarray(w[:, o]) for w, o in zip(weights, orders, strict=True)]
    coded = _encode_all(moved, factors, layout, search_of(layout, thorough=thorough))
    return [found if o is None else _moved_back(*found, o) for found, o in zip(coded, orders, strict=True)]


def _moved_back(codes: Codes, values: Tensor, order: npt.NDArray[np.int64]) -> tuple[Codes, Tensor]:
    """Return codes and values of sorted columns in the order that the columns have in the matrix."""
    back = np.argsort(order)
    own = np.ascontiguousarray(codes.codes[:, back])
    return replace(codes, codes=own), values[:, torch.from_numpy(back).to(values.device)].contiguous()


def _encode_all(
    weights: Sequence[FloatArray], factors: Sequence[Factors], layout: BlockFormat, search: CodeSearch
) -> list[tuple[Codes, Tensor]]:
    """`encode_all` of columns as they stand."""
    device, cols = factors[0].fed.device, weights[0].shape[1]
    if device.type != "cuda" or not _has_programs(layout, cols):
        found = [encode(w, f.form(), layout, **search._asdict()) for w, f in zip(weights, factors, strict=True)]
        return [(c, torch.from_numpy(c.values()).to(device)) for c in found]
    from bytecap.runtimes.blocks.cuda import encode_on_device

    there = torch.from_numpy(np.stack(weights)).to(device)
    if not bool(torch.isfinite(there).all()):
        raise UsageError("a weight is not finite")
    parts = [torch.stack([getattr(f, k) for f in factors]) for k in ("hessian", "fed", "weight")]
    return encode_on_device(there, parts, layout, _tables(layout), search)


def _has_programs(layout: BlockFormat, cols: int) -> bool:
    """Whether a CUDA device can round to a layout: free codes, scales of 16 bits, columns in tiles of 32."""
    scalar = layout.float_type in {"F16", "BF16"} and not getattr(layout, "vector", 0)
    return scalar and cols % 32 == 0 and layout.block % 32 == 0 and importlib.util.find_spec("triton") is not None


def _lengths(layout: BlockFormat, cols: int) -> tuple[int, ...]:
    subs, blocks = cols // layout.sub, cols // layout.block
    return cols, subs, subs, blocks, blocks
