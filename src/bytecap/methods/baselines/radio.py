"""`--method radio` gives every group of weights a depth by dual ascent on variances, and stores companded codes.

The distortion of a group at depth B is taken as `d(B) = G^2 S^2 2^(-2B)` per weight, G^2 its mean squared gradient and
S^2 its weights' variance. Minimising the sum at a mean depth R gives every group not at an end of the range the same
slope: `B = clip(1/2 (log2 S^2 + log2 G^2 - log2 lambda), 0, 8)`, with `log2 lambda += step (R_now - R)` until the mean
is met; then depths are rounded. Groups are sets of rows x one column: rows sorted by the log2 of their weight variance
plus that of their gradient variance, cut into equal sets. A group's weights go through a Laplace cube-root compander
to uniform codes, scale and offset searched for the least squared error; depth 0 leaves its mean.

Fitting to the cap: the target mean depth R is bisected on the real bytes of the file. Near the end one group at a time
changes its depth, so what is left is less than the weights of one group in bits. Sizes on the way are estimated, beyond
16M weights from every so many columns, and real sizes correct the estimate. The set size is the one of 64 to 512
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
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from bytecap.calibration.statistics import gradients
from bytecap.calibration.weight_gradients import KINDS, Gradients, mean_squared_gradients
from bytecap.errors import BudgetError, UsageError
from bytecap.format.coders.companded import CODER, dequantize
from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.decoder import from_matrix
from bytecap.job import Job, Outcome, Section
from bytecap.methods.baselines.companding import Array, Companding, Groups, cut
from bytecap.methods.baselines.owq import coded
from bytecap.methods.baselines.runs import matrices
from bytecap.methods.baselines.uniform import exact_sections
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.types import Unit

MAX_DEPTH = 8
SET_SIZES = (64, 128, 256, 512)
ROUNDS = 1
_GROUP_BITS = {False: 36.0, True: 28.0}  # of a group's scale, offset and depth: nominal; about, when coded
_HALVINGS = 30
_REPAIRS = 5  # real sizes against estimated ones
_SAMPLED = 2**24  # weights of a model that sizes are estimated from: columns at a stride
_PART = 2**17  # bytes left over that are not worth another coding, as a part of the budget


def depths_at(importance: Array, log_lambda: float) -> Array:
    """Return depths `clip(1/2 (log2 S^2 + log2 G^2 - log2 lambda), 0, 8)` before rounding."""
    found: Array = np.clip(0.5 * (importance - log_lambda), 0, MAX_DEPTH)
    return found


@dataclass(frozen=True)
class Spectrum:
    """Groups by rising importance, so that a mean depth takes two look-ups.

    Attributes:
        importance: log2 of G^2 S^2, rising (n,).
        weights: number of weights of the groups before each, (n + 1,).
        sums: sum of weights times importance before each, (n + 1,).
    """

    importance: Array
    weights: Array
    sums: Array

    @classmethod
    def of(cls, groups: Iterable[Groups]) -> Spectrum:
        """Rank the groups of some matrices."""
        matrices = list(groups)
        importance = np.concatenate([g.importance.reshape(-1) for g in matrices])
        order = np.argsort(importance, kind="stable")
        importance, weights = importance[order], np.concatenate([g.counts() for g in matrices])[order]
        before = [np.concatenate([[0.0], np.cumsum(x)]) for x in (weights, weights * importance)]
        return cls(importance, *before)

    def at(self, log_lambda: float) -> tuple[float, float]:
        """Return the mean depth before rounding, and the share of weights at neither end of the range."""
        low = int(np.searchsorted(self.importance, log_lambda, "right"))
        high = int(np.searchsorted(self.importance, log_lambda + 2 * MAX_DEPTH, "left"))
        inside = float(self.weights[high] - self.weights[low])
        bits = 0.5 * (float(self.sums[high] - self.sums[low]) - log_lambda * inside)
        total = float(self.weights[-1])
        return (bits + MAX_DEPTH * (total - float(self.weights[high]))) / total, inside / total


def dual_ascent(groups: Spectrum, rate: float, tolerance: float = 1e-10) -> float:
    """Return the log2 lambda at which the mean depth is `rate`.

    Args:
        groups: of all matrices.
        rate: bits per weight, 0 to 8.
        tolerance: of the mean depth.
    """
    log_lambda = float(groups.sums[-1] / groups.weights[-1]) - 2 * rate
    for _ in range(10_000):
        mean, inside = groups.at(log_lambda)
        over = mean - rate
        if abs(over) <= tolerance:
            break
        log_lambda += min(8.0, 2 / max(inside, 0.05)) * over  # the mean falls by half of `inside` per unit
    return log_lambda


@dataclass
class _Fit:
    """All matrices of a model as functions of the mean depth.

    Attributes:
        job: the job.
        parts: quantizers by unit name.
        means: mean inputs by unit name.
        exact: float32 values of the units kept exact.
        coded: entropy coded, or as published.
        spectrum: of all groups.
        samples: the same of large models at a stride of columns, by which sizes are estimated.
        estimates: sections of about the length that samples have as they are.
        tried: estimated bytes left at mean depths.
    """

    job: Job
    parts: dict[str, Companding]
    means: dict[str, Tensor]
    exact: dict[str, Tensor]
    coded: bool
    spectrum: Spectrum = field(init=False)
    samples: dict[str, Companding] = field(init=False)
    estimates: dict[str, Section] = field(default_factory=dict)
    tried: dict[float, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stride = -(-sum(p.weight.numel() for p in self.parts.values()) // _SAMPLED)
        self.spectrum = Spectrum.of(p.groups for p in self.parts.values())
        self.samples = self.parts if stride <= 1 else {n: p.some(stride) for n, p in self.parts.items()}

    def try_rate(self, rate: float) -> None:
        """Take the sampled groups to their depths at a mean depth of `rate` before rounding."""
        for name in self._move(self.samples, rate):
            self.estimates.pop(name, None)

    def move(self, rate: float) -> None:
        """Take every group to its depth at a mean depth of `rate` before rounding."""
        self.try_rate(rate)
        self._move(self.parts, rate)

    def _move(self, parts: Mapping[str, Companding], rate: float) -> list[str]:
        """Move groups to their depths; returns the names of matrices that change."""
        log_lambda = dual_ascent(self.spectrum, rate)
        depths = {n: np.rint(depths_at(p.groups.importance, log_lambda)).astype(np.uint8) for n, p in parts.items()}
        moved = [n for n, p in parts.items() if not np.array_equal(depths[n], p.code.depths)]
        for name in moved:
            parts[name].move(depths[name])
        return moved

    def _encoded(self, parts: Mapping[str, Companding], *, estimate: bool) -> dict[str, Section]:
        """Encode matrices side by side, the largest first."""

        def encode(part: Companding) -> bytes:
            return CODER.encode(part.code, coded=self.coded, estimate=estimate)

        names = sorted(parts, key=lambda n: -parts[n].weight.numel())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return {
                n: Section(CODER.tag, d) for n, d in zip(names, pool.map(encode, map(parts.get, names)), strict=True)
            }

    def sections(self, *, estimate: bool) -> dict[str, Section]:
        """Return the sections of all units as they are now."""
        units = {u.name: u for u in self.job.model.units}
        if estimate:
            missing = {n: p for n, p in self.samples.items() if n not in self.estimates}
            for name, section in self._encoded(missing, estimate=True).items():
                share = self.parts[name].weight.numel() / max(1, self.samples[name].weight.numel())
                self.estimates[name] = Section(CODER.tag, bytes(round(len(section.data) * share)))
            found = dict(self.estimates)
        else:
            found = self._encoded(self.parts, estimate=False)
        found |= exact_sections([units[n] for n in self.exact], self.exact)
        sampled = estimate and self.samples is not self.parts
        return {n: found[n] for n in units} | ({} if sampled else self._biases(units))

    def _biases(self, units: Mapping[str, Unit]) -> dict[str, Section]:
        """Return biases that take up the mean error of their layer."""
        found = {}
        for name, bias in bias_names(units).items():
            if name in self.parts and name in self.means and bias in self.exact:
                lost = self.parts[name].weight.cpu() - torch.from_numpy(dequantize(self.parts[name].code))
                value = self.exact[bias].double() + (lost.double() @ self.means[name])[None]
                found[bias] = Section(EXACT.tag, EXACT.encode(value.float().numpy(), units[bias].dtype))
        return found

    def room(self) -> int:
        """Estimate the bytes left of the budget."""
        return self.job.budget - self.job.size(self.sections(estimate=True), b"")


def bias_names(units: Mapping[str, Unit]) -> dict[str, str]:
    """Return the unit of the bias beside every weight that has one, by unit name."""
    return {
        u.name: bias
        for u in units.values()
        for n in (u.name, *u.aliases)
        if n.endswith("weight") and (bias := n.removesuffix("weight") + "bias") in units
    }


def _bisect(fit: _Fit, room: int) -> float:
    """Bisect for the largest mean depth whose estimated size leaves at least `room` bytes."""
    low, high = 0.0, float(MAX_DEPTH)
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        if rate not in fit.tried:
            fit.try_rate(rate)
            fit.tried[rate] = fit.room()
        if fit.tried[rate] >= room:
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
    best, chosen = fit.sections(estimate=False), 0.0
    left = fit.job.budget - fit.job.size(best, b"")
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
        if 0 <= room <= max(48, fit.job.budget // _PART):
            break
        correction = fit.room() - room
    return chosen, best


def _set_size(weights: Mapping[str, Tensor], found: Gradients, budget: int, group_bits: float) -> int:
    """Return the rows of a set with the least predicted distortion at a budget."""
    total = sum(w.numel() for w in weights.values())
    best = (math.inf, SET_SIZES[0])
    for size in SET_SIZES:
        groups = [cut(w, found.square[n], size) for n, w in weights.items()]
        rate = (8 * budget - group_bits * sum(g.importance.size for g in groups)) / total
        if rate > 0:
            log_lambda = dual_ascent(Spectrum.of(groups), min(rate, MAX_DEPTH), 1e-6)
            lost = [g.importance - 2 * depths_at(g.importance, log_lambda) for g in groups]
            best = min(best, (sum(float(g.sizes @ np.exp2(x).sum(1)) for g, x in zip(groups, lost, strict=True)), size))
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
            parts = {n: Companding.start(w, cut(w, found.square[n], size), job.device) for n, w in weights.items()}
            fit = _Fit(job, parts, found.inputs, {n: values[n] for n in fixed}, entropy)
            rate, sections = _solve(fit)
            advance(1)
        if i + 1 < rounds:
            module = _quantized_copy(job, parts)
    lost = sum(
        float((found.square[n] * (weights[n] - torch.from_numpy(dequantize(p.code))).square()).sum()) / 2
        for n, p in parts.items()
    )
    return Outcome(sections, b"", lost, math.nan, math.nan, f"radio {rate:.3f} bits, sets of {size} rows")
