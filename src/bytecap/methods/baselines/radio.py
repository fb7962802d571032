"""`--method radio` gives every group of weights a depth by dual ascent on variances, and stores companded codes.

The distortion of a group at depth B is taken as `d(B) = G^2 S^2 2^(-2B)` per weight, G^2 its mean squared gradient and
S^2 its weights' variance. Minimising the sum at a mean depth R gives every group not at an end of the range the same
slope: `B = clip(1/2 (log2 S^2 + log2 G^2 - log2 lambda), 0, 8)`, with `log2 lambda += step (R_now - R)` until the mean
is met; then depths are rounded. Groups are sets of rows x one column: rows sorted by the log2 of their weight variance
plus that of their gradient variance, cut into equal sets. A group's weights go through a Laplace cube-root compander
to uniform codes, scale and offset searched for the least squared error; depth 0 leaves its mean.

Fitting to the cap: the target mean depth R is bisected on the real bytes of the file. Near the end one group at a time
changes its depth, so what is left is less than the weights of one group in bits. The set size is the one of 64 to 512
rows with the least predicted distortion at the cap, since a group's scale, offset and depth cost bytes too.

Source: Young, Radio (arXiv:2505.03031). As there, gradients are those of the final hidden states' principal components
(`bytecap.calibration.weight_gradients`). The paper leaves embeddings and head in 16 bit; here they are in the budget,
and what the hidden states do not see, the head, gets gradients of the loss. `options["gradients"] = "loss"` takes those
of the loss against the model's own labels everywhere. Scale and offset are refitted in closed form for every scale
tried. Where a map has a bias, it takes up the mean error, `(W - W^) E[x]`; where it has none, nothing does.

Omitted: error feedback, which the paper does not have either. KL to the original on the embedded 1.4M model at 600,000
bytes, 4,096 calibration tokens: 1.00 coded, 1.29 as published (`golf` 0.42, `owq` 0.76).

`options["accounting"]` is `coded` (default) or `published`, as in `owq`; `options["rounds"]` says how often gradients
are measured, after the first time in the quantized model, as a running mean (default once: a second time took the 1.29
above to 1.28, within its standard error).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bytecap.calibration.statistics import gradients
from bytecap.calibration.weight_gradients import KINDS, Gradients, mean_squared_gradients
from bytecap.errors import BudgetError, UsageError
from bytecap.format.coders.companded import CODER, MAX_SETS, CompandedCode, dequantize, levels
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.decoder import from_matrix
from bytecap.job import Job, Outcome, Section
from bytecap.methods.baselines.owq import coded
from bytecap.methods.baselines.runs import matrices
from bytecap.methods.baselines.uniform import exact_sections
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.types import Unit

MAX_DEPTH = 8
SET_SIZES = (64, 128, 256, 512)
ROUNDS = 1
_SCALES = np.geomspace(0.5, 1.6, 7)  # tried, in standard deviations
_GROUP_BITS = {False: 36.0, True: 28.0}  # of a group's scale, offset and depth: nominal; about, when coded
_HALVINGS = 30
_REPAIRS = 5  # real sizes against estimated ones
_NOTHING = -200.0  # log2 of the distortion of a group that cannot be distorted

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


def _log2(values: Tensor) -> Tensor:
    return torch.where(values > 0, values.double().clamp(min=1e-60).log2(), _NOTHING / 2)


def _by_set(values: Tensor, sets: Tensor, sizes: Tensor) -> Tensor:
    """Return the mean over the rows of every set, float64 (count, cols)."""
    total = torch.zeros(len(sizes), values.shape[1], dtype=torch.float64)
    return total.index_add_(0, sets, values.double()) / sizes[:, None]


def cut(weight: Tensor, square: Tensor, size: int) -> Groups:
    """Cut rows into sets of about `size`, and weigh every group.

    Args:
        weight: float32 (rows, cols).
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
    importance = (_log2(spread) + _log2(_by_set(square, sets, sizes))).clamp(min=_NOTHING)
    return Groups(sets.numpy(), sizes.numpy(), importance.numpy())


def depths_at(importance: Array, log_lambda: float) -> Array:
    """Return depths `clip(1/2 (log2 S^2 + log2 G^2 - log2 lambda), 0, 8)` before rounding."""
    found: Array = np.clip(0.5 * (importance - log_lambda), 0, MAX_DEPTH)
    return found


def dual_ascent(importance: Array, weights: Array, rate: float, tolerance: float = 1e-10) -> float:
    """Return the log2 lambda at which the mean depth is `rate`.

    Args:
        importance: log2 of G^2 S^2 of every group, (n,).
        weights: number of weights in every group, (n,).
        rate: bits per weight, 0 to 8.
        tolerance: of the mean depth.
    """
    total = float(weights.sum())
    log_lambda = float(weights @ importance) / total - 2 * rate
    for _ in range(10_000):
        depth = depths_at(importance, log_lambda)
        over = float(weights @ depth) / total - rate
        if abs(over) <= tolerance:
            break
        inside = float(weights[(depth > 0) & (depth < MAX_DEPTH)].sum()) / total
        log_lambda += min(8.0, 2 / max(inside, 0.05)) * over  # the mean falls by half of `inside` per unit
    return log_lambda


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

    @staticmethod
    def start(weight: Tensor, groups: Groups) -> Companding:
        """Start at depth 0 everywhere."""
        sets, sizes = torch.from_numpy(groups.sets), torch.from_numpy(groups.sizes)
        offsets = _by_set(weight, sets, sizes).clamp(-65504, 65504).half().numpy()
        none = np.zeros(groups.importance.shape, np.uint8)
        codes = np.zeros(tuple(weight.shape), np.uint8)
        return Companding(weight, groups, CompandedCode(groups.sets, none, offsets, np.zeros_like(offsets), codes))

    def move(self, depths: npt.NDArray[np.uint8]) -> None:
        """Quantize the groups whose depth has changed."""
        code, sets = self.code, self.groups.sets
        changed = depths != code.depths
        for depth in np.unique(depths[changed]).tolist():
            chosen = changed & (depths == depth)
            cols = np.flatnonzero(chosen.any(0))
            mask = chosen[:, cols]
            found = compand(self.weight[:, torch.from_numpy(cols)], self.groups, depth)
            _put(code.codes, cols, found[0], mask[sets])
            _put(code.scales, cols, found[1], mask)
            _put(code.offsets, cols, found[2], mask)
        self.code = replace(code, depths=depths)


def _put(old: npt.NDArray[Any], cols: npt.NDArray[np.int64], new: npt.NDArray[Any], where: npt.NDArray[Any]) -> None:
    """Replace values in some columns of an array where a mask of these columns says so."""
    part = old[:, cols]
    part[where] = new[where]
    old[:, cols] = part


def _nearest_codes(weight: Tensor, scale: Tensor, offset: Tensor, depth: int) -> Tensor:
    """Return the nearest codes of weights at scales and offsets of the same shape."""
    v = (weight - offset) * torch.where(scale > 0, 1 / scale, 0.0)
    uniform = 0.5 * (1 + v.sign() * (1 - torch.exp(v.abs() * (-math.sqrt(2) / 3))))
    return (uniform * (1 << depth)).floor_().clamp_(0, (1 << depth) - 1).long()


def compand(
    weight: Tensor, groups: Groups, depth: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Try scales and offsets; returns codes (rows, cols), scales and offsets (sets, cols) of least squared error.

    Args:
        weight: float32 (rows, cols).
        groups: of the matrix that these columns are from; only its sets are used.
        depth: bits of a code; at 0 the offset is the mean.
    """
    sets, sizes = torch.from_numpy(groups.sets), torch.from_numpy(groups.sizes)
    mean = _by_set(weight, sets, sizes)
    spread = (_by_set(weight.square(), sets, sizes) - mean.square()).clamp(min=0).sqrt()
    table = torch.from_numpy(levels(depth))
    error = torch.full_like(mean, math.inf)
    scale, offset, codes = torch.zeros_like(mean).half(), mean.half(), torch.zeros(weight.shape, dtype=torch.uint8)
    for ratio in _SCALES if depth else ():
        level = table[_nearest_codes(weight, (ratio * spread).float()[sets], mean.float()[sets], depth)]
        centre = _by_set(level, sets, sizes)
        width = _by_set(level.square(), sets, sizes) - centre.square()
        fit = (_by_set(level * weight, sets, sizes) - centre * mean) / width.clamp(min=1e-12)
        fit = torch.where((width > 1e-9) & (fit > 0), fit, ratio * spread)
        c, o = fit.clamp(max=65504).half(), (mean - fit * centre).clamp(-65504, 65504).half()
        z = _nearest_codes(weight, c.float()[sets], o.float()[sets], depth)
        found = _by_set((weight - o.float()[sets] - c.float()[sets] * table[z]).square(), sets, sizes)
        better = found < error
        error, scale, offset = (torch.where(better, new, old) for new, old in ((found, error), (c, scale), (o, offset)))
        codes = torch.where(better[sets], z.to(torch.uint8), codes)
    return codes.numpy(), scale.numpy(), offset.numpy()


@dataclass
class _Fit:
    """All matrices of a model as functions of the mean depth.

    Attributes:
        job: the job.
        parts: quantizers by unit name.
        means: mean inputs by unit name.
        exact: float32 values of the units kept exact.
        coded: entropy coded, or as published.
    """

    job: Job
    parts: dict[str, Companding]
    means: dict[str, Tensor]
    exact: dict[str, Tensor]
    coded: bool
    estimates: dict[str, Section] = field(default_factory=dict)

    def move(self, rate: float) -> None:
        """Take every group to its depth at a mean depth of `rate` before rounding."""
        importance = np.concatenate([p.groups.importance.reshape(-1) for p in self.parts.values()])
        weights = np.concatenate([_counts(p.groups) for p in self.parts.values()])
        log_lambda = dual_ascent(importance, weights, rate)
        for name, part in self.parts.items():
            depths = np.rint(depths_at(part.groups.importance, log_lambda)).astype(np.uint8)
            if not np.array_equal(depths, part.code.depths):
                part.move(depths)
                self.estimates.pop(name, None)

    def sections(self, *, estimate: bool) -> dict[str, Section]:
        """Return the sections of all units as they are now."""
        units = {u.name: u for u in self.job.model.units}
        if estimate:
            for name in self.parts.keys() - self.estimates.keys():
                data = CODER.encode(self.parts[name].code, coded=self.coded, estimate=True)
                self.estimates[name] = Section(CODER.tag, data)
            found = dict(self.estimates)
        else:
            found = {n: Section(CODER.tag, CODER.encode(p.code, coded=self.coded)) for n, p in self.parts.items()}
        found |= exact_sections([units[n] for n in self.exact], self.exact)
        return {n: found[n] for n in units} | self._biases(units)

    def _biases(self, units: Mapping[str, Unit]) -> dict[str, Section]:
        """Return biases that take up the mean error of their layer."""
        found = {}
        for name, bias in bias_names(units).items():
            if name in self.parts and name in self.means and bias in self.exact:
                lost = self.parts[name].weight - torch.from_numpy(dequantize(self.parts[name].code))
                value = self.exact[bias].double() + (lost.double() @ self.means[name])[None]
                found[bias] = Section(EXACT.tag, EXACT.encode(value.float().numpy(), units[bias].dtype))
        return found

    def room(self, *, estimate: bool) -> int:
        """Return the bytes left of the budget."""
        return self.job.budget - self.job.size(self.sections(estimate=estimate), b"")


def bias_names(units: Mapping[str, Unit]) -> dict[str, str]:
    """Return the unit of the bias beside every weight that has one, by unit name."""
    return {
        u.name: bias
        for u in units.values()
        for n in (u.name, *u.aliases)
        if n.endswith("weight") and (bias := n.removesuffix("weight") + "bias") in units
    }


def _counts(groups: Groups) -> Array:
    """Return the number of weights of every group, in the order of `importance`."""
    return np.repeat(groups.sizes.astype(np.float64), groups.importance.shape[1])


def _bisect(fit: _Fit, room: int) -> float:
    """Bisect for the largest mean depth whose estimated size leaves at least `room` bytes."""
    low, high = 0.0, float(MAX_DEPTH)
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        fit.move(rate)
        if fit.room(estimate=True) >= room:
            low = rate
        else:
            high = rate
    fit.move(low)
    return low


def _solve(fit: _Fit) -> tuple[float, dict[str, Section]]:
    """Return the mean depth before rounding, and real sections that fit the budget and use it.

    Raises:
        BudgetError: depth 0 everywhere does not fit.
    """
    fit.move(0.0)
    best, left, chosen = fit.sections(estimate=False), fit.room(estimate=False), 0.0
    if left < 0:
        floor = fit.job.budget - left
        raise BudgetError(f"radio needs {floor:,} bytes without a single bit, {fit.job.budget:,} are left", floor)
    correction = 0  # estimated less real room
    for _ in range(_REPAIRS):
        rate = _bisect(fit, correction)
        real = fit.sections(estimate=False)
        room = fit.job.budget - fit.job.size(real, b"")
        if 0 <= room < left:
            best, left, chosen = real, room, rate
        if 0 <= room <= 48:
            break
        correction = fit.room(estimate=True) - room
    return chosen, best


def _set_size(weights: Mapping[str, Tensor], found: Gradients, budget: int, group_bits: float) -> int:
    """Return the rows of a set with the least predicted distortion at a budget."""
    total = sum(w.numel() for w in weights.values())
    best = (math.inf, SET_SIZES[0])
    for size in SET_SIZES:
        groups = [cut(w, found.square[n], size) for n, w in weights.items()]
        importance = np.concatenate([g.importance.reshape(-1) for g in groups])
        count = np.concatenate([_counts(g) for g in groups])
        rate = (8 * budget - group_bits * len(count)) / total
        if rate > 0:
            depth = depths_at(importance, dual_ascent(importance, count, min(rate, MAX_DEPTH), 1e-6))
            best = min(best, (float(count @ np.exp2(importance - 2 * depth)), size))
    return best[1]


def _quantized_copy(job: Job, parts: Mapping[str, Companding]) -> nn.Module:
    """Return a copy of the model with its quantized weights."""
    quantized_copy = copy_of(job.model.module)
    for u in job.model.units:
        if u.name in parts:
            load_values(quantized_copy, {u.name: from_matrix(u, dequantize(parts[u.name].code))})
    return quantized_copy


def _gradients(job: Job, module: nn.Module, seed: int, kind: str) -> Gradients:
    total = sum(w.predicted for w in job.sets.statistics)
    with job.reporter.step("gradients", total) as advance:
        return mean_squared_gradients(
            module, job.model.units, job.sets.statistics, kind=kind, seed=seed, device=job.device, progress=advance
        )


def run(job: Job) -> Outcome:
    """Run Radio: companded groups at depths by dual ascent, as deep as the cap allows."""
    entropy, rounds = coded(job.options), int(job.options.get("rounds", ROUNDS))
    kind = str(job.options.get("gradients", KINDS[0]))
    if kind not in KINDS:
        raise UsageError(f"radio: unknown gradients {kind!r}: use {' or '.join(KINDS)}")
    values = matrices(job)
    fixed = exact_sections(job.model.units, values)
    weights = {n: w for n, w in values.items() if n not in fixed}
    capacity = job.budget - sum(len(s.data) for s in fixed.values())
    found, module = Gradients(), job.model.module
    for i in range(max(1, rounds)):
        again = _gradients(job, module, job.seed + i, kind) if i else gradients(job, kind)
        for name, weight in weights.items():  # what no gradient was ever seen of counts as the least of all
            square = again.square.get(name, torch.zeros_like(weight))
            old = found.square.get(name, square)
            found.square[name] = old + (square - old) / (i + 1)
        found.inputs = again.inputs if i == 0 else found.inputs
        with job.reporter.step("dual ascent to the cap", 1) as advance:
            size = int(job.options.get("group", 0)) or _set_size(weights, found, capacity, _GROUP_BITS[entropy])
            parts = {n: Companding.start(w, cut(w, found.square[n], size)) for n, w in weights.items()}
            fit = _Fit(job, parts, found.inputs, {n: values[n] for n in fixed}, entropy)
            rate, sections = _solve(fit)
            advance(1)
        if i + 1 < rounds:
            module = _quantized_copy(job, parts)
    lost = sum(
        float((found.square[n] * (p.weight - torch.from_numpy(dequantize(p.code))).square()).sum()) / 2
        for n, p in parts.items()
    )
    return Outcome(sections, b"", lost, math.nan, math.nan, f"radio {rate:.3f} bits, sets of {size} rows")
