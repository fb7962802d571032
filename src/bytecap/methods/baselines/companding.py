"""Quantize groups of weights by a compander, each at its own depth, for `radio`.

A group is a set of rows x one column. Groups do not interact, so only those of a new depth are quantized again, many
at a time: one group a row, on the device where the weights lie, filled up to the longest by what counts for
nothing. Sums run along rows, in one order on one device.

Source: Young, Radio (arXiv:2505.03031). Omitted: error feedback, as there.

>>> weight = torch.tensor([[0.1, 3.0], [-0.1, 3.0], [0.3, 3.0]])
>>> part = Companding.start(weight, cut(weight, torch.ones(3, 2), 64))
>>> part.move(np.array([[8, 0]], np.uint8))
>>> part.code.depths.tolist(), part.code.codes[:, 1].tolist(), part.code.offsets[0, 1].item()
([[8, 0]], [0, 0, 0], 3.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.format.coders.companded import MAX_SETS, CompandedCode, levels

NOTHING = -200.0  # log2 of the distortion of a group that cannot be distorted
_SCALES = np.geomspace(0.5, 1.6, 7)  # tried, in standard deviations
_TOGETHER = {"cpu": 2**20, "cuda": 2**26}  # weights that are quantized at a time

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Groups:
    """The groups that one matrix is cut into.

    Attributes:
        sets: set of every row, (rows,).
        sizes: rows of every set, (count,).
        importance: log2 of G^2 S^2 of every group, (count, cols).
    """

    sets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    importance: Array

    def counts(self) -> Array:
        """Return the number of weights of every group, in the order of `importance`, flat."""
        return np.repeat(self.sizes.astype(np.float64), self.importance.shape[1])

    def some(self, stride: int) -> Groups:
        """Return the groups of every `stride`-th column."""
        return Groups(self.sets, self.sizes, self.importance[:, ::stride])


def _log2(values: Tensor) -> Tensor:
    return torch.where(values > 0, values.double().clamp(min=1e-60).log2(), NOTHING / 2)


def _by_set(values: Tensor, sets: Tensor, sizes: Tensor) -> Tensor:
    """Return the mean over the rows of every set, float64 (count, cols)."""
    total = torch.zeros(len(sizes), values.shape[1], dtype=torch.float64)
    return total.index_add_(0, sets, values.double()) / sizes[:, None]


def cut(weight: Tensor, square: Tensor, size: int) -> Groups:
    """Cut rows into sets of about `size`, and weigh every group.

    Args:
        weight: float32 (rows, cols), on the processor.
        square: mean squared gradients (rows, cols).
        size: rows of a set.
    """
    rows = len(weight)
    count = min(MAX_SETS, max(1, round(rows / size)))
    score = _log2(weight.var(1, correction=0)) + _log2(square.mean(1))
    sets = torch.empty(rows, dtype=torch.long)
    sets[torch.argsort(score, stable=True)] = torch.arange(rows) * count // max(1, rows)
    sizes = torch.bincount(sets, minlength=count).clamp(min=1)
    mean = _by_set(weight, sets, sizes)
    spread = _by_set((weight - mean.float()[sets]).square(), sets, sizes)
    importance = (_log2(spread) + _log2(_by_set(square, sets, sizes))).clamp(min=NOTHING)
    return Groups(sets.numpy(), sizes.numpy(), importance.numpy())


@dataclass
class Companding:
    """One matrix under a companded quantizer; when depths change, only those groups are quantized again.

    Attributes:
        weight: float32 (rows, cols).
        groups: its groups.
        code: its present state.
    """

    weight: Tensor
    groups: Groups
    code: CompandedCode
    _members: Tensor = field(repr=False)  # (count, most): rows of every set, any row behind them

    @staticmethod
    def start(weight: Tensor, groups: Groups, device: str = "cpu") -> Companding:
        """Start at depth 0 everywhere; groups are quantized on `device`."""
        sets, sizes = torch.from_numpy(groups.sets), torch.from_numpy(groups.sizes)
        offsets = _by_set(weight, sets, sizes).clamp(-65504, 65504).half().numpy()
        none = np.zeros(groups.importance.shape, np.uint8)
        codes = np.zeros(tuple(weight.shape), np.uint8)
        code = CompandedCode(groups.sets, none, offsets, np.zeros_like(offsets), codes)
        begin = torch.cumsum(sizes, 0) - sizes
        place = begin[:, None] + torch.arange(int(sizes.max()) if len(weight) else 0)
        members = torch.argsort(sets, stable=True)[place.clamp(max=len(weight) - 1)]
        return Companding(weight.to(device), groups, code, members.to(device))

    def some(self, stride: int) -> Companding:
        """Return every `stride`-th column, at depth 0."""
        device = self.weight.device
        return Companding.start(self.weight[:, ::stride].cpu(), self.groups.some(stride), str(device))

    def move(self, depths: npt.NDArray[np.uint8]) -> None:
        """Quantize the groups whose depth has changed."""
        code, device = self.code, self.weight.device
        sizes = torch.from_numpy(self.groups.sizes).to(device)
        width = self._members.shape[1]
        step = max(1, _TOGETHER.get(device.type, _TOGETHER["cpu"]) // max(1, width))
        changed = depths != code.depths
        for depth in np.unique(depths[changed]).tolist():
            one, two = np.nonzero(changed & (depths == depth))
            for at in range(0, len(one), step):
                s, c = one[at : at + step], two[at : at + step]
                chosen, col = torch.from_numpy(s).to(device), torch.from_numpy(c).to(device)
                rows, size = self._members[chosen], sizes[chosen]
                there = torch.arange(width, device=device) < size[:, None]
                found = compand(self.weight[rows, col[:, None]] * there, there, size, depth)
                place = (rows * self.weight.shape[1] + col[:, None])[there]
                code.codes.reshape(-1)[place.cpu().numpy()] = found[0][there].cpu().numpy()
                code.scales[s, c] = found[1].cpu().numpy()
                code.offsets[s, c] = found[2].cpu().numpy()
        self.code = CompandedCode(code.sets, depths, code.offsets, code.scales, code.codes)


def _nearest_codes(weight: Tensor, scale: Tensor, offset: Tensor, depth: int) -> Tensor:
    """Return the nearest codes of weights (groups, most) at scales and offsets (groups, 1)."""
    v = (weight - offset) * torch.where(scale > 0, 1 / scale, 0.0)
    uniform = 0.5 * (1 + v.sign() * (1 - torch.exp(v.abs() * (-math.sqrt(2) / 3))))
    return (uniform * (1 << depth)).floor_().clamp_(0, (1 << depth) - 1).long()


def compand(weight: Tensor, there: Tensor, sizes: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Try scales and offsets; returns uint8 codes (groups, most), float16 scales and offsets (groups,) of least error.

    Args:
        weight: float32 (groups, most), 0 behind a group's last.
        there: whether a weight is one, (groups, most).
        sizes: weights of every group, (groups,).
        depth: bits of a code; at 0 the offset is the mean.
    """

    def mean_of(values: Tensor) -> Tensor:
        return values.sum(1, dtype=torch.float64) / sizes

    mean = mean_of(weight)
    spread = (mean_of(weight.square()) - mean.square()).clamp(min=0).sqrt()
    table = torch.from_numpy(levels(depth)).to(weight.device)
    error = torch.full_like(mean, math.inf)
    scale, offset = torch.zeros_like(mean).half(), mean.half()
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    for ratio in _SCALES.tolist() if depth else ():
        z = _nearest_codes(weight, (ratio * spread).float()[:, None], mean.float()[:, None], depth)
        level = table[z] * there
        centre = mean_of(level)
        width = mean_of(level.square()) - centre.square()
        fit = (mean_of(level * weight) - centre * mean) / width.clamp(min=1e-12)
        fit = torch.where((width > 1e-9) & (fit > 0), fit, ratio * spread)
        c, o = fit.clamp(max=65504).half(), (mean - fit * centre).clamp(-65504, 65504).half()
        z = _nearest_codes(weight, c.float()[:, None], o.float()[:, None], depth)
        found = mean_of((weight - o.float()[:, None] - c.float()[:, None] * table[z]).square() * there)
        better = found < error
        error, scale, offset = (torch.where(better, new, old) for new, old in ((found, error), (c, scale), (o, offset)))
        codes = torch.where(better[:, None], z.to(torch.uint8), codes)
    return codes, scale, offset
