"""Round the columns of a block with several candidates side by side, by torch, for many rows and matrices at once.

The rule is that of `beam`: each way goes on with the two levels around what feedback asks for, those of least
distortion remain, and the best one is taken at the end of a tile of columns. Sums may come in another order, so where
two ways are equally good another one may win. Rows do not depend on one another: as many go together
as memory holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bytecap.runtimes.blocks import BlockFormat, FloatArray
from bytecap.runtimes.blocks.beam import TILE, neighbours
from bytecap.runtimes.blocks.search import TINY

_ROOM = 2**26  # values of all ways at a time


@dataclass(frozen=True)
class Levels:
    """The levels that codes may have, on a device.

    Attributes:
        low, high: the lowest and the highest.
        table: the nearest one for every half step from `low`; empty where all integers are levels.
        beside: the next lower and the next higher one (2, high - low + 1) of every level, likewise.
    """

    low: float
    high: float
    table: Tensor
    beside: Tensor

    @staticmethod
    def of(layout: BlockFormat, table: FloatArray, device: torch.device) -> Levels:
        """Those of a layout, whose nearest ones are in `table`."""
        low, high = table.dtype.type(layout.low), table.dtype.type(layout.high)
        there = (torch.from_numpy(t).to(device) for t in (table, neighbours(low, high, table)))
        return Levels(float(low), float(high), *there)

    def around(self, t: Tensor) -> Tensor:
        """Levels nearest to `t`, and those on its other side or the same again where there is none, (..., 2)."""
        inside = t.clamp(self.low, self.high)
        if len(self.table):
            near = self.table[(inside + inside - 2 * self.low).long()]
            at = (near - self.low).long()
            other = torch.where(t > near, self.beside[1][at], self.beside[0][at])
        else:
            near = inside.round()
            other = torch.where(t > near, near + 1, near - 1).clamp(self.low, self.high)
        return torch.stack((near, torch.where(inside == t, other, near)), -1)


@dataclass(frozen=True)
class Tile:
    """Columns that are rounded together.

    Attributes:
        asked: what feedback from behind the tile asks for, (matrices, rows, columns).
        weight: what errors are measured from, likewise.
        scale, minimum: of every column, likewise.
        push: shares (matrices, columns, columns) of the error of the first column that are fed to the second.
        own: weight (matrices, columns) of every column's own error.
    """

    asked: Tensor
    weight: Tensor
    scale: Tensor
    minimum: Tensor
    push: Tensor
    own: Tensor

    def part(self, rows: slice) -> Tile:
        """Some of the rows, sharing memory."""
        asked, weight, scale, minimum = (t[:, rows] for t in (self.asked, self.weight, self.scale, self.minimum))
        return Tile(asked, weight, scale, minimum, self.push, self.own)


def best_block(
    asked: Tensor, weight: Tensor, tried: Tensor, minimum: Tensor | None, subs: tuple[Tensor, Tensor], fed: Tensor,
    own: Tensor, levels: Levels, width: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes and errors of a block as `round_block` has them, and its scale (matrices, rows): which loses least.

    All scales go side by side, as if they were more rows.

    Args:
        asked: see `round_block`.
        weight: likewise.
        tried: scales, (matrices, trials, rows).
        minimum: of the block, (matrices, rows); None where sub-minimums are zero points, in scales.
        subs: integer sub-scales and sub-minimums, (matrices, subs, rows).
        fed: see `round_block`.
        own: likewise.
        levels: likewise.
        width: likewise.
    """
    matrices, trials, rows = tried.shape
    scale = tried.flatten(1)[:, None]
    lowest = scale if minimum is None else minimum.repeat(1, trials)[:, None]
    given = [t.repeat(1, 1, trials) for t in (asked, weight, *subs)]
    codes, errors, lost = round_block(given[0], given[1], scale * given[2], lowest * given[3], fed, own, levels, width)
    best = lost.view(matrices, trials, rows).argmin(1, keepdim=True)

    def chosen(found: Tensor) -> Tensor:
        there = best[:, None].expand(matrices, found.shape[1], 1, rows)
        return found.view(matrices, -1, trials, rows).gather(2, there)[:, :, 0]

    return chosen(codes), chosen(errors), tried.gather(1, best)[:, 0]


def round_block(
    asked: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor, fed: Tensor, own: Tensor, levels: Levels, width: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes and errors (matrices, columns, rows) of a block, last column to first, by `width` ways side by side.

    Also their distortion (matrices, rows).

    Args:
        asked: what feedback from behind the block asks for, (matrices, columns, rows).
        weight: likewise.
        scale: of sub-blocks, (matrices, subs, rows).
        minimum: likewise.
        fed: the block's own part of the shares of errors, (matrices, columns, columns), as in `encode.Form`.
        own: weights (matrices, columns), likewise.
        levels: that codes may have.
        width: as `beam` says.
    """
    codes, errors, lost = torch.empty_like(asked), torch.empty_like(asked), torch.zeros_like(asked[:, 0])
    sub = asked.shape[1] // scale.shape[1]
    for stop in range(asked.shape[1], 0, -TILE):
        at = slice(max(0, stop - TILE), stop)
        come = asked[:, at]
        if stop < asked.shape[1]:
            come = torch.baddbmm(come, fed[:, at, stop:], errors[:, stop:])
        grids = (t.repeat_interleave(sub, 1)[:, at] for t in (scale, minimum))
        across = [t.transpose(1, 2).contiguous() for t in (come, weight[:, at], *grids, fed[:, at, at])]
        tile = Tile(across[0], across[1], across[2], across[3], across[4], own[:, at])
        found, loss = _round_tile(tile, levels, width)
        codes[:, at] = found.transpose(1, 2)
        errors[:, at] = (tile.weight - (tile.scale * found - tile.minimum)).transpose(1, 2)
        lost += loss
    return codes, errors, lost


def _round_tile(tile: Tile, levels: Levels, width: int) -> tuple[Tensor, Tensor]:
    """Codes (matrices, rows, columns) of a tile and their distortion (matrices, rows), some rows at a time."""
    matrices, rows, columns = tile.asked.shape
    some = max(1, _ROOM // (matrices * width * columns))
    parts = [_round_rows(tile.part(slice(at, at + some)), levels, width) for at in range(0, rows, some)]
    codes, lost = (torch.cat(p, 1) for p in zip(*parts, strict=True))
    return codes, lost


def _round_rows(tile: Tile, levels: Levels, width: int) -> tuple[Tensor, Tensor]:
    ways, costs = tile.asked[:, :, None], torch.zeros_like(tile.asked[:, :, :1])  # (matrices, rows, ways[, columns])
    unsound = tile.scale.abs() <= float(TINY)
    inverse = torch.where(unsound, 0.0, 1 / tile.scale)
    kept: list[tuple[Tensor, Tensor]] = []
    for i in range(tile.asked.shape[2] - 1, -1, -1):
        scale, minimum = tile.scale[:, :, i, None], tile.minimum[:, :, i, None]
        asked = ways[..., i] + minimum
        both = levels.around(asked * inverse[:, :, i, None])
        lack = asked[..., None] - scale[..., None] * both
        cost = costs[..., None] + tile.own[:, i, None, None, None] * lack * lack
        cost[..., 1].masked_fill_((both[..., 1] == both[..., 0]) | unsound[:, :, i, None], torch.inf)
        ranked, order = cost.flatten(2).sort(dim=2, stable=True)
        costs, order = ranked[..., :width], order[..., :width]
        parent, code = order >> 1, both.flatten(2).gather(2, order)
        kept.append((parent, code))
        error = tile.weight[:, :, i, None] - (scale * code - minimum)
        ahead = ways[..., :i].gather(2, parent[..., None].expand(*parent.shape, i))
        ways = torch.addcmul(ahead, error[..., None], tile.push[:, None, None, i, :i])
    return _traced(kept), costs[..., 0]


def _traced(kept: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Codes of the best way, from every way's parent and code at every column, last column first."""
    codes = []
    way = torch.zeros_like(kept[0][0][..., :1])  # the best comes first
    for parent, code in reversed(kept):
        codes.append(code.gather(2, way))
        way = parent.gather(2, way)
    return torch.cat(codes, 2)
