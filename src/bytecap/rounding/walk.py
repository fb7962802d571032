"""Rounding every column for itself, without feedback: what recovery does after every move.

Columns along the trellis of `bytecap.rounding.trellis` are walked one row after the other on the processor. On a GPU,
where 4096 rows after one another would leave it idle, all columns of all matrices are cut into pieces that are walked
side by side, each with some rows of both neighbours: the path of least error forgets where it began within a few
multiples of the trellis's memory of three rows. Pieces need not fit together, so what comes out is for gradients only;
what is stored is rounded by `bytecap.rounding`.

Source: parallel Viterbi decoding by overlapping blocks, as GPU decoders of convolutional codes do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from bytecap.coders.trellis import SUBSET
from bytecap.rounding.trellis import viterbi

_PIECE, _OVERLAP = 128, 64  # rows of a piece, and of what it sees of either neighbour: 0.5% of the points differ
_AT_ONCE = 2**32  # bytes of branch costs
_FAR = 1e4  # weight of the rows in front of a column: its path begins in state 0


@dataclass(frozen=True)
class Shape:
    """What stays as it is while a matrix is rounded again and again.

    Attributes:
        weight: (rows,), weights of the squared errors.
        fine: (cols,) or (groups, cols), which columns are walked; groups are of rows.
    """

    weight: Tensor
    fine: Tensor


def _columns(u: Any, weight: Any, fine: Any, out: Any) -> None:
    """Points of the fine columns of u (cols, rows); other columns of `out` are left alone."""
    for k in range(len(u)):
        if fine[k]:
            viterbi(u[k], weight, out[k])


_walk_columns: Any = numba.njit(nogil=True, cache=True)(_columns)


def nearest(values: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
    """Points of least squared error, in float32, for matrices (rows, cols) in units of their grids.

    Fine columns are walked along the trellis, all others are rounded to the nearest integer.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for u, s in zip(values, shapes, strict=True):
        fine = s.fine if s.fine.ndim == 2 else s.fine[None]
        groups = len(fine)
        rows = zip(torch.tensor_split(u, groups), torch.tensor_split(s.weight, groups), fine, strict=True)
        parts += [(a.detach(), b, c) for a, b, c in rows]
    if parts and parts[0][0].device.type != "cpu":
        walked = _in_pieces([(u, w) for u, w, _ in parts])
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            walked = list(pool.map(lambda p: _on_processor(*p), parts))
    found = [torch.where(f, w, torch.round(u)) for (u, _, f), w in zip(parts, walked, strict=True)]
    out, at = [], 0
    for s in shapes:
        count = len(s.fine) if s.fine.ndim == 2 else 1
        out.append(torch.cat(found[at : at + count]) if count > 1 else found[at])
        at += count
    return out


def _on_processor(u: Tensor, weight: Tensor, fine: Tensor) -> Tensor:
    turned = np.ascontiguousarray(u.numpy().T)
    points = np.zeros(turned.shape, np.int32)
    _walk_columns(turned, weight.float().numpy(), fine.numpy(), points)
    return torch.from_numpy(np.ascontiguousarray(points.T).astype(np.float32))


def _in_pieces(parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Walk all columns of (rows, cols) matrices with row weights (rows,) as pieces, side by side."""
    u = torch.cat([_cut(x, 0.0, 0.0) for x, _ in parts], 1)
    weight = torch.cat([_cut(w[:, None].expand_as(x), _FAR, 0.0) for x, w in parts], 1)
    subset = _walk(u, weight)[_OVERLAP : _OVERLAP + _PIECE].to(u.dtype)
    inner = u[_OVERLAP : _OVERLAP + _PIECE]
    points = torch.floor((inner - subset).mul_(0.25).add_(0.5)).mul_(4).add_(subset)
    out, at = [], 0
    for x, _ in parts:
        rows, cols = x.shape
        pieces = -(-rows // _PIECE)
        mine = points[:, at : at + pieces * cols].reshape(_PIECE, pieces, cols)
        out.append(mine.transpose(0, 1).reshape(pieces * _PIECE, cols)[:rows])
        at += pieces * cols
    return out


def _cut(x: Tensor, before: float, behind: float) -> Tensor:
    """(rows, cols) as overlapping pieces (piece with both overlaps, pieces * cols)."""
    rows, cols = x.shape
    pieces = -(-rows // _PIECE)
    front = x.new_full((_OVERLAP, cols), before)
    back = x.new_full((pieces * _PIECE - rows + _OVERLAP, cols), behind)
    whole = torch.cat([front, x, back])
    return whole.unfold(0, _PIECE + 2 * _OVERLAP, _PIECE).permute(2, 0, 1).reshape(_PIECE + 2 * _OVERLAP, -1)


def _walk(u: Tensor, weight: Tensor) -> Tensor:
    """Subsets (rows, columns), uint8, of the best path through every column, which may begin in any state."""
    at_once = max(1, _AT_ONCE // (64 * len(u)))
    pairs = zip(u.split(at_once, 1), weight.split(at_once, 1), strict=True)
    return torch.cat([_best_path(a.contiguous(), b.contiguous()) for a, b in pairs], 1)


def _best_path(u: Tensor, weight: Tensor) -> Tensor:
    """See `_walk`; everything but the walk itself is done for all rows at once."""
    (rows, columns), device = u.shape, u.device
    rest = u[:, None] - torch.arange(4, device=device, dtype=u.dtype)[None, :, None]
    branch = (rest - 4 * torch.floor(rest * 0.25 + 0.5)).square_() * weight[:, None]  # (rows, 4, columns)
    subset = torch.tensor(SUBSET, device=device)  # by state and bit
    lower, upper = (branch[:, subset[s].reshape(-1)] for s in (slice(4), slice(4, 8)))  # (rows, 8, columns)
    cost = torch.zeros(8, columns, device=device)
    came = torch.empty(rows, 8, columns, dtype=torch.bool, device=device)
    for r in range(rows):
        one = (cost[:4, None] + lower[r].view(4, 2, columns)).view(8, columns)
        two = (cost[4:, None] + upper[r].view(4, 2, columns)).view(8, columns)
        torch.gt(one, two, out=came[r])
        cost = torch.minimum(one, two)
        if r % 32 == 31:
            cost -= cost.amin(0)
    del lower, upper, branch, rest
    first = torch.arange(8, device=device, dtype=torch.uint8)[:, None] >> 1
    before = first + 4 * came.to(torch.uint8)  # state in front of every state
    state = torch.argmin(cost, 0, keepdim=True)
    path = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    for r in range(rows - 1, -1, -1):
        last = before[r].gather(0, state)
        torch.add(2 * last[0], (state[0] & 1), out=path[r])
        state = last.long()
    return subset.reshape(-1).to(torch.uint8)[path.long()]
