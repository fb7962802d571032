"""Coordinate descent over a coded block under the whole Hessian: codes, then sub-scales, then float16 scales.

Error feedback settles every column once, with the columns before it still open. Afterwards each number is looked at
again with all others as they are; a change is made only where the distortion falls. Each block takes its gradient
anew from the errors of all columns, so nothing accumulates. Codes and sub-scales go row by row, because few of them
change; float16 scales are solved for all lanes at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.runtimes.blocks.search import LANES, Grid, compiled, half, near

_Array = npt.NDArray[Any]
_ZERO, _ONE = np.float32(0), np.float32(1)


def _codes(
    g: _Array, h: _Array, inv: _Array, w: _Array, q: _Array, a: _Array, c: _Array, sub: int, low: Any, high: Any,
    table: _Array,
) -> None:  # fmt: skip
    """Every code `q` of one row's block, last to first, and the decoded values `w`.

    `g` is H times the error, `h` (cols, cols) the block's own part of H, `inv` one over its diagonal; `a` and `c` are
    scales and minimums of sub-blocks.
    """
    for b in range(len(a) - 1, -1, -1):
        scale, minimum = a[b], c[b]
        if scale == _ZERO:
            continue
        inverse = _ONE / scale
        for j in range(b * sub + sub - 1, b * sub - 1, -1):
            new = near((w[j] + g[j] * inv[j] + minimum) * inverse, low, high, table)
            if new != q[j]:
                change = scale * (new - q[j])
                q[j] = new
                w[j] += change
                row = h[j]
                for k in range(len(q)):
                    g[k] -= change * row[k]


def _shift(g: _Array, h: _Array, w: _Array, first: int, step: Any, unit: Any, q: _Array) -> None:
    """Add `step * unit * q` to the values from column `first` on."""
    for i in range(len(q)):
        change = step * unit * q[i]
        if change != _ZERO:
            w[first + i] += change
            row = h[first + i]
            for k in range(len(g)):
                g[k] -= change * row[k]


def _step(old: Any, slope: Any, curve: Any, low: int, high: int) -> Any:
    """Change of an integer that lowers the distortion most, 0 if none does."""
    if curve <= _ZERO:
        return _ZERO
    step = min(max(np.rint(old + slope / curve), np.float32(low)), np.float32(high)) - old
    return step if step * (slope + slope - step * curve) > _ZERO else _ZERO


shift: Any = compiled(_shift)
step_of: Any = compiled(_step)


def _sub_scales(
    g: _Array, h: _Array, sums: _Array, w: _Array, q: _Array, ls: _Array, m: _Array, d: Any, dm: Any, sub: int,
    scales: tuple[int, int], minimums: int, ones: _Array, hv: _Array,
) -> None:  # fmt: skip
    """Integer sub-scales `ls` and sub-minimums `m` of one row's block.

    `sums` has the sum of every sub-block's own part of `h`; `ones` are that, `hv` is room for a sub-block.
    """
    for b in range(len(ls)):
        first = b * sub
        hv[:sub] = _ZERO
        for i in range(sub):
            x, row = q[first + i], h[first + i]
            for k in range(sub):
                hv[k] += x * row[first + k]
        slope, curve = _ZERO, _ZERO
        for i in range(sub):
            slope += q[first + i] * g[first + i]
            curve += q[first + i] * hv[i]
        step = step_of(ls[b], d * slope, d * d * curve, scales[0], scales[1])
        if step != _ZERO:
            ls[b] += step
            shift(g, h, w, first, step, d, q[first : first + sub])
        if minimums > 0:
            slope = _ZERO
            for i in range(sub):
                slope -= g[first + i]
            step = step_of(m[b], dm * slope, dm * dm * sums[b], 0, minimums)
            if step != _ZERO:
                m[b] += step
                shift(g, h, w, first, step, -dm, ones)


def _floats(
    g: _Array, v: _Array, hv: _Array, u: _Array, hu: _Array, minimums: int, positive: bool, unit: Grid, d: _Array,
    dm: _Array, sums: _Array,
) -> None:  # fmt: skip
    """Float16 scale `d` and minimum `dm` (LANES,) of a block, solved together.

    `g` is H times the error, (cols, LANES); `v` and `u` are values per unit of scale and of minimum, `hv` and `hu` H
    times these. `positive`: the minimum must not be negative. `sums` is room, (>= 5, LANES).
    """
    sums[:] = _ZERO
    for i in range(len(v)):
        for r in range(LANES):
            sums[0, r] += v[i, r] * hv[i, r]
            sums[1, r] += v[i, r] * g[i, r]
    if minimums > 0:
        for i in range(len(v)):
            for r in range(LANES):
                sums[2, r] += u[i, r] * hu[i, r]
                sums[3, r] += u[i, r] * hv[i, r]
                sums[4, r] += u[i, r] * g[i, r]
    for r in range(LANES):
        vv, vg = float(sums[0, r]), float(sums[1, r])
        uu, uv, ug = float(sums[2, r]), float(sums[3, r]), float(sums[4, r])
        if vv <= 0.0:
            continue
        x, z = vg / vv, 0.0
        det = vv * uu - uv * uv
        if det > 1e-6 * vv * uu:
            x, z = (vg * uu - uv * ug) / det, (uv * vg - vv * ug) / det
        nd, nm = half(d[r] + x, unit), half(dm[r] + z, unit)
        if positive and nm < 0.0:
            nm = float(dm[r])
        x, z = nd - d[r], nm - dm[r]
        if 2 * (x * vg - z * ug) > x * x * vv - 2 * x * z * uv + z * z * uu:
            d[r], dm[r] = nd, nm


codes: Any = compiled(_codes)
sub_scales: Any = compiled(_sub_scales)
floats: Any = compiled(_floats)
