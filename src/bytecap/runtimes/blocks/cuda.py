"""Matrices into a block format on a CUDA device, with the programs of `bytecap.runtimes.blocks.triton_programs`.

Matrices of one shape go together, each under its own metric. Blocks go last to first as on the processor; columns of a
block are rounded by `device_beam`. In descent they go in tiles, between which errors travel by products of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bytecap.runtimes.blocks import BlockFormat, Codes
from bytecap.runtimes.blocks import triton_programs as programs
from bytecap.runtimes.blocks.code_search import CodeSearch
from bytecap.runtimes.blocks.device_beam import Levels, best_block

TILE = 32  # columns of a tile in descent
_LANES = 32  # rows of a program that goes through a tile
_TOGETHER = 2048  # values of a program that searches


@dataclass
class _State:
    """Matrices on their way, all float32.

    Attributes:
        weight: (B, cols, rows), divided by `unit`, with rows padded.
        unit: (B,), a power of two.
        error: weight less decoded value, likewise.
        q: codes, likewise.
        numbers: scale, minimum (B, blocks, rows); sub-scales, sub-minimums (B, subs, rows).
        hessian, fed: (B, cols, cols), as in `Form`.
        weights: (B, cols), as in `Form`.
        inverse: (B, cols), one over the Hessian's diagonal.
        solved: (B, blocks, block, block), inverses of the blocks on the diagonal of `fed`.
        tables: levels, candidates for scales of sub-blocks and of blocks.
        levels: the same levels, as `device_beam` wants them.
    """

    layout: BlockFormat
    weight: Tensor
    unit: Tensor
    error: Tensor
    q: Tensor
    numbers: tuple[Tensor, Tensor, Tensor, Tensor]
    hessian: Tensor
    fed: Tensor
    weights: Tensor
    inverse: Tensor
    solved: Tensor
    tables: tuple[Tensor, Tensor, Tensor]
    levels: Levels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Matrices, columns, padded rows."""
        batch, cols, rows = self.weight.shape
        return batch, cols, rows


def encode_on_device(
    weights: Tensor, factors: Sequence[Tensor], layout: BlockFormat, tables: Sequence[Any], search: CodeSearch
) -> list[tuple[Codes, Tensor]]:
    """Codes and values of matrices (B, rows, cols) under their metrics; see `bytecap.runtimes.blocks.encode.encode`.

    Args:
        weights: finite values.
        factors: Hessian and fed-back factors (B, cols, cols), weights of columns (B, cols).
        layout: the block format; 32 divides the columns.
        tables: levels, candidates for scales of sub-blocks and of blocks.
        search: how long to look for codes.
    """
    rows = weights.shape[1]
    state = _start(weights, factors, layout, tables)
    for first in range(weights.shape[2] - layout.block, -1, -layout.block):
        _round_block(state, first, search)
    for _ in range(search.sweeps):
        for first in range(weights.shape[2] - layout.block, -1, -layout.block):
            _descend_block(state, first)
    return _finished(state, rows)


def _start(weights: Tensor, factors: Sequence[Tensor], layout: BlockFormat, tables: Sequence[Any]) -> _State:
    batch, rows, cols = weights.shape
    device, wide = weights.device, -(-rows // _LANES) * _LANES
    peak = weights.abs().amax((1, 2))
    unit = torch.where(peak > 0, torch.exp2(torch.ceil(torch.log2(peak.double()))), 1.0).float()
    weight = torch.zeros(batch, cols, wide, device=device)
    weight[:, :, :rows] = (weights / unit[:, None, None]).transpose(1, 2)

    def room(step: int) -> Tensor:
        return torch.zeros(batch, cols // step, wide, device=device)

    numbers = room(layout.block), room(layout.block), room(layout.sub), room(layout.sub)
    hessian, fed, column = (f.contiguous() for f in factors)
    inverse = 1 / hessian.diagonal(dim1=1, dim2=2)
    there = [torch.from_numpy(t).to(device) for t in tables]
    there[0] = there[0] if len(there[0]) else torch.zeros(1, device=device)
    return _State(
        layout, weight, unit, room(1), room(1), numbers, hessian, fed, column, inverse.contiguous(),
        _solved(fed, layout.block), (there[0], there[1], there[2]), Levels.of(layout, tables[0], device),
    )  # fmt: skip


def _solved(fed: Tensor, block: int) -> Tensor:
    """Inverses of the blocks on the diagonal of `fed`, of which the last is never asked for."""
    batch, cols, _ = fed.shape
    inner = (
        torch.stack([fed[:, i : i + block, i : i + block] for i in range(0, cols - block, block)], 1).double()
        if cols > block
        else fed.new_zeros(batch, 0, block, block, dtype=torch.float64)
    )
    eye = torch.eye(block, dtype=torch.float64, device=fed.device).expand_as(inner)
    found: Tensor = torch.linalg.solve_triangular(inner, eye, upper=True, unitriangular=True)
    return found.float()


def _round_block(state: _State, first: int, search: CodeSearch) -> None:
    """Search the numbers of the block at column `first`, then its codes by several ways side by side."""
    layout, cols = state.layout, state.shape[1]
    last, per = first + layout.block, layout.block // layout.sub
    own, subs = slice(first, last), slice(first // layout.sub, first // layout.sub + per)
    given = state.weight[:, own]
    come = torch.bmm(state.fed[:, own, last:], state.error[:, last:])
    settled = given
    if last < cols:
        settled = torch.baddbmm(given, state.solved[:, first // layout.block], come)
    _search(state, settled.contiguous(), first)
    d, dm = (t[:, first // layout.block] for t in state.numbers[:2])
    ls, m = (t[:, subs] for t in state.numbers[2:])
    tried = torch.stack([_stored(state, d * factor) for factor in search.trials], 1)
    state.q[:, own], state.error[:, own], d[:] = best_block(
        come + given, given, tried, None if _zero(layout) else dm, (ls, m), state.fed[:, own, own],
        state.weights[:, own], state.levels, search.width,
    )  # fmt: skip
    if _zero(layout):
        dm[:] = d


def _stored(state: _State, scale: Tensor) -> Tensor:
    """Scales (matrices, rows) as they are stored, in units of the weights."""
    kind, unit = torch.float16 if state.layout.float_type == "F16" else torch.bfloat16, state.unit[:, None]
    found: Tensor = (scale * unit).clamp(-_most(kind), _most(kind)).to(kind).float() / unit
    return found


def _most(kind: torch.dtype) -> float:
    return torch.finfo(kind).max


def _search(state: _State, settled: Tensor, first: int) -> None:
    layout, (batch, cols, rows) = state.layout, state.shape
    per, sub = layout.block // layout.sub, 1 << (layout.sub - 1).bit_length()
    lanes = max(1, min(_LANES, _TOGETHER // (per * sub)))
    programs.search[rows // lanes, batch](
        settled, state.weights, state.unit, *state.tables, *state.numbers, rows, cols, first, layout.block, layout.sub,
        float(layout.low), float(layout.high), len(state.tables[1]),
        2 if not layout.minimums and layout.low != -layout.high else 1, len(state.tables[2]),
        float(layout.scales[0]), float(layout.scales[1]), layout.minimums, 1 if layout.scales[1] <= 31 else 0,
        PER=per, SUB=sub, R=lanes, LEVELS=bool(layout.levels), TWO=layout.two_level, MINIMUM=layout.minimums > 0,
        ZERO=_zero(layout), BF16=layout.float_type == "BF16", num_warps=4 if per * sub * lanes <= _TOGETHER else 8,
    )  # fmt: skip


def _zero(layout: BlockFormat) -> bool:
    """Whether sub-minimums are zero points."""
    return layout.minimums > 1 and not layout.two_level


def _descend_block(state: _State, first: int) -> None:
    """One sweep of coordinate descent over the block at column `first`."""
    layout, (batch, cols, rows) = state.layout, state.shape
    block, last = layout.block, first + layout.block
    own = state.hessian[:, first:last, first:last]
    g = torch.bmm(state.hessian[:, first:last], state.error)
    change = torch.empty(batch, TILE, rows, device=g.device)
    d, dm, ls, m = state.numbers
    for start in range(last - TILE, first - TILE, -TILE):
        programs.descend_tile[rows // _LANES, batch](
            g, state.hessian, state.inverse, state.tables[0], d, ls, state.q, change, rows, cols, first, start, block,
            layout.sub, float(layout.low), float(layout.high), TILE=TILE, R=_LANES, LEVELS=bool(layout.levels),
            num_warps=1,
        )  # fmt: skip
        at = start - first
        g = torch.baddbmm(g, own[:, :, at : at + TILE], change, alpha=-1)
    if layout.two_level:
        _descend_scales(state, own, g, first)
    per, at = block // layout.sub, first // layout.sub
    q = state.q[:, first:last].view(batch, per, layout.sub, rows)
    small, less = ls[:, at : at + per, None], m[:, at : at + per, None].expand_as(q)
    v = (small * q - less if _zero(layout) else small * q).reshape(batch, block, rows)
    u = less.reshape(batch, block, rows).contiguous() if layout.minimums and not _zero(layout) else v
    hv = torch.bmm(own, v)
    hu = torch.bmm(own, u) if u is not v else hv
    programs.descend_floats[rows // _LANES, batch](
        g, v, hv, u, hu, state.weight, state.unit, d, dm, state.error, rows, cols, first, block,
        CHUNK=TILE, R=_LANES, MINIMUM=layout.minimums > 0 and not _zero(layout), ZERO=_zero(layout),
        POSITIVE=layout.two_level, BF16=layout.float_type == "BF16", num_warps=4,
    )  # fmt: skip


def _descend_scales(state: _State, own: Tensor, g: Tensor, first: int) -> None:
    layout, (batch, cols, rows) = state.layout, state.shape
    block, sub = layout.block, layout.sub
    per, lanes = block // sub, _TOGETHER // block
    columns = own.reshape(batch, block, per, sub)
    q = state.q[:, first : first + block].view(batch, per, sub, rows)
    u = torch.matmul(columns.permute(0, 2, 1, 3), q).contiguous()
    ones = columns.sum(3)
    sums = ones.view(batch, per, sub, per).sum(2).diagonal(dim1=1, dim2=2)
    programs.descend_scales[rows // lanes, batch](
        g, u, ones, sums.contiguous(), state.q, *state.numbers, rows, cols, first, float(layout.scales[0]),
        float(layout.scales[1]), float(layout.minimums), PER=per, SUB=sub, R=lanes, MINIMUM=layout.minimums > 0,
        num_warps=4,
    )  # fmt: skip


def _finished(state: _State, rows: int) -> list[tuple[Codes, Tensor]]:
    """Return codes as arrays, and values on the device."""
    layout, kind = state.layout, torch.uint8 if state.layout.high > 127 else torch.int8

    def there(found: Tensor, to: torch.dtype) -> Tensor:
        return found[:, :, :rows].transpose(1, 2).to(to).contiguous()

    half = torch.float16 if layout.float_type == "F16" else torch.float32
    d, dm, ls, m = state.numbers
    floats = [there(x * state.unit[:, None, None], half) for x in (d, dm)]
    parts = (there(state.q, kind), there(ls, torch.int8), there(m, kind), *floats)
    values = _values(layout, *parts)
    arrays = [p.cpu().numpy() for p in parts]
    return [(Codes(layout, *(a[i] for a in arrays)), values[i]) for i in range(len(values))]


def _values(layout: BlockFormat, q: Tensor, ls: Tensor, m: Tensor, d: Tensor, dm: Tensor) -> Tensor:
    """Decoded matrices, in every bit those of `Codes.values`."""
    per = layout.block // layout.sub
    scale = d.float().repeat_interleave(per, 2)
    if layout.two_level:
        scale = scale * ls.float()
    found = q.float().view(*ls.shape, layout.sub) * scale[..., None]
    if layout.minimums:
        found -= (dm.float().repeat_interleave(per, 2) * m.float())[..., None]
    return found.view(q.shape)
