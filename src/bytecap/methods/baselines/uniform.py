"""`--method uniform` rounds to nearest and zips, at the bit width that fits, as the plain baseline.

It is the usual way to make a model smaller: every row is divided by `max|row| / L` and rounded, `L` levels a side,
and the bytes go through zlib. `L = 2^(b-1) - 1` is the b-bit format; every `L` from 1 to 127 is allowed here, so
that the baseline is not short-changed by whole bits. The bytes that the largest fitting `L` leaves over buy `L + 1`
levels for leading tensors and the leading rows of one more: scales are per row, so the format does not change.

`measure` and `fill` also serve `golf`: both methods end with two codings of every tensor, one that fits the budget
and a finer one that does not, and mix them.

Omitted, on purpose: calibration, error feedback, clipping search, entropy coding beyond zlib.

>>> import torch
>>> unit = Unit("w", (4, 64), "F32", linear=True)
>>> weight = torch.linspace(-1, 1, 256).reshape(4, 64)
>>> sections = uniform([unit], {"w": weight}, 150)
>>> sections["w"].tag, len(sections["w"].data) <= 150
(4, True)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bytecap.errors import BudgetError
from bytecap.format.coders.packed import CODER, ZLIB, Quantized
from bytecap.job import Section
from bytecap.types import Unit

Progress = Callable[[int], None]
MAX_LEVELS = 127  # an int8 container, symmetric
_EXACT_VALUES = 65_536  # a tensor that is no known matrix and not larger than this is kept exact
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_SAMPLE, _PIECES = 2**16, 8  # values of a matrix that sizes are guessed from, and pieces that they are taken in
_PROBES = 24  # compressions spent on one tensor to use up the budget


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix and its real section."""

    matrix: Quantized
    data: bytes
    tag: int


Writer = Callable[[Quantized], Section]
Name = TypeVar("Name")


def zipped(matrix: Quantized) -> Section:
    """Return a `packed` section under zlib-9."""
    return Section(CODER.tag, CODER.encode(matrix, ZLIB))


def is_exact(unit: Unit) -> bool:
    """Return whether baselines keep a unit exact: vectors, integers, small tensors that are no stack of matrices."""
    return (
        len(unit.shape) < 2
        or unit.dtype not in _FLOATS
        or not (unit.linear or unit.stacked or unit.parameters > _EXACT_VALUES)
    )


def exact_sections(units: Sequence[Unit], weights: Mapping[str, Tensor]) -> dict[str, Section]:
    """Return sections of the units that are kept exact, in their source dtype."""
    from bytecap.format.coders.exact import CODER as EXACT

    return {
        u.name: Section(EXACT.tag, EXACT.encode(weights[u.name].detach().cpu().numpy(), u.dtype))
        for u in units
        if is_exact(u)
    }


def tolerance(capacity: int) -> int:
    """Return the bytes that a method may leave unused."""
    return max(32, int(0.0003 * capacity))


def total(parts: Mapping[str, CodedMatrix]) -> int:
    """Return the bytes of all sections."""
    return sum(len(p.data) for p in parts.values())


def measure(matrices: Mapping[Name, Quantized], write: Writer) -> dict[Name, CodedMatrix]:
    """Compress every matrix, the largest first; compressors release the interpreter lock, so threads help."""
    largest_first = sorted(matrices, key=lambda n: -matrices[n].codes.size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sections = dict(zip(largest_first, pool.map(write, (matrices[n] for n in largest_first)), strict=True))
    return {n: CodedMatrix(m, sections[n].data, sections[n].tag) for n, m in matrices.items()}


def _mixed(low: Quantized, high: Quantized, rows: int) -> Quantized:
    """Take the first `rows` rows from `high`, the others from `low`."""
    return Quantized(
        np.concatenate([high.codes[:rows], low.codes[rows:]]),
        np.concatenate([high.scales[:rows], low.scales[rows:]]),
    )


def _split_rows(low: CodedMatrix, high: CodedMatrix, room: int, enough: int, write: Writer) -> CodedMatrix:
    """Return the number of leading rows of `high` that `room` more bytes pay for, found on real sizes.

    Sizes grow almost linearly with the number of rows, so guesses are interpolated; every second one halves the
    bracket in case they do not. Stops once at most `enough` bytes would stay unused.
    """
    best, limit = low, len(low.data) + room
    fits, over = (0, len(low.data)), (len(low.matrix.codes), len(high.data))
    for probe in range(_PROBES):
        width = over[0] - fits[0]
        if width <= 1 or limit - len(best.data) <= enough:
            break
        share = (limit - fits[1]) / max(1, over[1] - fits[1]) if probe % 2 == 0 else 0.5
        rows = fits[0] + min(width - 1, max(1, round(width * share)))
        matrix = _mixed(low.matrix, high.matrix, rows)
        section = write(matrix)
        data = section.data
        if len(data) > limit:
            over = (rows, len(data))
            continue
        fits = (rows, len(data))
        if len(data) >= len(best.data):
            best = CodedMatrix(matrix, data, section.tag)
    return best


def fill(
    low: Mapping[str, CodedMatrix], high: Mapping[str, CodedMatrix], room: int, *, write: Writer, enough: int
) -> dict[str, CodedMatrix]:
    """Mix two codings of a model so that `room` bytes more than `low` takes are used.

    Tensors move to `high` one after the other while they fit. Of those that do not, the last ones give their
    leading rows, until at most `enough` bytes are left.

    Args:
        low: a coding that fits.
        high: a finer one, of the same tensors.
        room: bytes to spend on top of `low`.
        write: makes sections.
        enough: bytes that may stay unused.
    """
    mixed, left = dict(low), []
    for name, part in low.items():
        gain = len(high[name].data) - len(part.data)
        if gain <= room:
            mixed[name] = high[name]
            room -= gain
        else:
            left.append(name)
    for name in reversed(left):
        if room <= enough:
            break
        mixed[name] = _split_rows(low[name], high[name], room, enough, write)
        room -= len(mixed[name].data) - len(low[name].data)
    return mixed


def round_rows(weight: npt.NDArray[np.float32], levels: int) -> Quantized:
    """Round every row to the nearest of `levels` levels a side, `scale = max|row| / levels` in fp16.

    Args:
        weight: (rows, cols).
        levels: 1 to 127.
    """
    peak = np.abs(weight).max(axis=1, initial=0)
    scales = np.minimum(peak / np.float32(levels), np.finfo(np.float16).max).astype(np.float16)
    step = scales.astype(np.float32)[:, None]
    ratio = np.divide(weight, step, out=np.zeros_like(weight), where=step > 0)
    return Quantized(np.clip(np.rint(ratio), -levels, levels).astype(np.int8), scales)


def guess(arrays: Mapping[str, npt.NDArray[np.float32]], room: int, progress: Progress) -> int:
    """Return the levels a side that about fit into `room` bytes, by even samples of the rows of large matrices."""
    samples, shares = {}, {}
    for n, w in arrays.items():
        parts = -(-w.size // _SAMPLE)  # neighbouring rows, since compressors look for what was there before
        size = -(-len(w) // (parts * _PIECES)) or 1
        rows = [w[at : at + size] for at in range(0, len(w), size * parts)]
        samples[n] = np.concatenate(rows) if rows else w
        shares[n] = w.size / max(1, samples[n].size)
    fits, over = 1, MAX_LEVELS + 1
    while over - fits > 1:
        levels = (fits + over) // 2
        found = measure({n: round_rows(w, levels) for n, w in samples.items()}, zipped)
        progress(0)
        if sum(len(p.data) * shares[n] for n, p in found.items()) <= room:
            fits = levels
        else:
            over = levels
    return fits


def uniform(
    units: Sequence[Unit], weights: Mapping[str, Tensor], capacity: int, progress: Progress = lambda _: None
) -> dict[str, Section]:
    """Return sections of all units by round to nearest, in at most `capacity` bytes.

    Args:
        units: of the model.
        weights: float32 (rows, cols) by unit name, vectors as one row.
        capacity: bytes for all sections together.
        progress: called with 0 after every number of levels tried and with 1 at the end.

    Raises:
        BudgetError: one level a side (ternary) does not fit; `.floor` is the size it needs.
    """
    sections = exact_sections(units, weights)
    fixed = sum(len(s.data) for s in sections.values())
    arrays = {u.name: weights[u.name].detach().float().cpu().numpy() for u in units if u.name not in sections}

    def at(tried: Sequence[int]) -> list[dict[str, CodedMatrix]]:
        found = measure({(n, k): round_rows(w, k) for n, w in arrays.items() for k in tried}, zipped)
        progress(0)
        return [{n: found[n, k] for n in arrays} for k in tried]

    fits, over, low, high = 0, MAX_LEVELS + 1, dict[str, CodedMatrix](), None
    first = guess(arrays, capacity - fixed, progress)
    tried = [k for k in (first, first + 1) if k <= MAX_LEVELS]
    while over - fits > 1:
        for levels, found in zip(tried, at(tried), strict=True):
            if fixed + total(found) <= capacity:
                fits, low = levels, found
            elif levels < over:
                over, high = levels, found
        tried = [fits + 1 if fits else over - 1]
    if not fits:
        floor = fixed + total(high or {})
        raise BudgetError(f"round to nearest needs {floor:,} bytes at one level a side, {capacity:,} are left", floor)
    if high is not None:
        room, enough = capacity - fixed - total(low), tolerance(capacity) // 4
        low = fill(low, high, room, write=zipped, enough=enough)
    progress(1)
    sections |= {n: Section(part.tag, part.data) for n, part in low.items()}
    return {u.name: sections[u.name] for u in units}
