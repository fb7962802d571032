"""`--method owq` runs GPTQ at a fixed width and keeps the columns that would suffer most in 16 bits.

For every linear layer, column j scores `s_j = H_jj * sum_i (W - Q(W))_ij^2`, H the second moment of the layer's inputs
and Q round to nearest. The k columns of highest score stay float16. They come last in GPTQ, so that they absorb the
errors of all others; the rest is rounded by an asymmetric quantizer of b bits with one scale and zero point a row,
whose range is fitted without the protected columns by a search over clipped ranges.

Fitting to the cap: b is the largest whole width that fits, embeddings at most one bit above it. Then every layer
protects the same share of its columns (so that each spends the same fraction of its bytes), the largest share that
fits; what is left buys single columns, the most expensive first.

Source: Lee et al., OWQ (arXiv:2306.02272); Frantar et al., GPTQ (arXiv:2210.17323), with 1% damping. Chosen here,
where the paper is silent: its models keep embeddings in 16 bit, here they are inside the budget and are rounded to
nearest, one scale and zero point a row; the other columns go by falling diagonal ("act-order"), as in `golf`; ranges
are searched for the least squared error. Omitted: tuning of the protected columns, groups of columns.

Where no column stands out, protecting columns is a poor way to spend bytes: on the embedded 1.4M model at 3 bits, one
to four protected columns of 128 leave 1 to 37% more output error than the same bytes as one bit more for some rows
(real input moments, 14 layers); with three outlier columns of 160 they leave less than 70% of it (tests/test_owq.py).

`options["accounting"]` is `coded` (default: integers and floats behind the entropy coder) or `published` (every value
at its nominal width, as the paper counts).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bytecap.errors import BudgetError, UsageError
from bytecap.format.coders.fixed import CODER, FixedCode
from bytecap.format.wire.integers import MAX_WIDTH
from bytecap.job import Job, Outcome, Section
from bytecap.methods.baselines.gptq import factorize, feedback
from bytecap.methods.baselines.runs import matrices, second_moments
from bytecap.methods.baselines.uniform import exact_sections

_RANGES = 40  # clipped ranges tried for a row, down to a fifth of the whole one
_HALVINGS = 12  # of the share of protected columns
_REPAIRS = 4  # real sizes against estimated ones
_MOST_COLUMNS = 65_535  # what a u16 index reaches


def coded(options: Mapping[str, Any]) -> bool:
    """Return whether `options["accounting"]` asks for entropy-coded sections.

    Raises:
        UsageError: it is neither `coded` nor `published`.
    """
    accounting = options.get("accounting", "coded")
    if accounting not in {"coded", "published"}:
        raise UsageError(f"unknown accounting {accounting!r}: use coded or published")
    return bool(accounting == "coded")


def row_ranges(weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Fit scales (rows,) and zero points (rows,) of an asymmetric quantizer of `width` bits by least squared error.

    Ranges hold zero and both ends shrink together. Scales are float32 values that float16 holds.

    Args:
        weight: float32 (rows, cols).
        width: bits of a code.
    """
    levels = (1 << width) - 1
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    best = torch.full((len(weight),), math.inf)
    scales, zeros = torch.zeros_like(best), torch.zeros_like(best)
    for i in range(_RANGES):
        share = 1 - 0.8 * i / _RANGES
        scale = (share * (high - low) / levels).clamp(max=65504).half().float()
        zero = torch.where(scale > 0, torch.round(-share * low / scale), 0.0).clamp(0, levels)
        error = (nearest(weight, scale, zero, width) * scale[:, None] - weight).square().sum(1)
        better = error < best
        best, scales, zeros = (
            torch.where(better, new, old) for new, old in ((error, best), (scale, scales), (zero, zeros))
        )
    return scales, zeros


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, width: int) -> Tensor:
    """Return the nearest codes minus zero points, (rows, cols) as float32."""
    inverse = torch.where(scales > 0, 1 / scales, 0.0)[:, None]
    levels = (1 << width) - 1
    return torch.minimum(torch.maximum(torch.round(weight * inverse), -zeros[:, None]), (levels - zeros)[:, None])


def column_scores(weight: Tensor, hessian: Tensor, width: int) -> Tensor:
    """Return `H_jj * sum_i (W - Q(W))_ij^2` of every column, float64 (cols,), where Q rounds to nearest."""
    scales, zeros = row_ranges(weight, width)
    error = nearest(weight, scales, zeros, width) * scales[:, None] - weight
    return 2 * hessian.diagonal().double() * error.double().square().sum(0)


def quantize(weight: Tensor, hessian: Tensor | None, width: int, weak: Sequence[int] = ()) -> FixedCode:
    """Quantize one matrix at `width` bits.

    Args:
        weight: float32 (rows, cols).
        hessian: float64 (cols, cols); None rounds to nearest.
        width: bits of a code, 1 to 8.
        weak: columns to protect.
    """
    columns = sorted(weak)
    plain = [j for j in range(weight.shape[1]) if j not in set(columns)]
    if not plain:
        scales = zeros = torch.zeros(len(weight))
    else:
        scales, zeros = row_ranges(weight[:, plain], width)
    if hessian is None or not plain:
        codes, protected = nearest(weight, scales, zeros, width), weight[:, columns]
    else:
        factor = factorize(hessian, last=columns)
        levels = (1 << width) - 1
        codes, kept = feedback(weight, factor, scales, -zeros, levels - zeros, len(columns))
        at = {int(j): i for i, j in enumerate(factor.order[len(plain) :])}
        protected = kept[:, [at[j] for j in columns]]
    stored = codes[:, plain] + zeros[:, None]
    halves = protected.clamp(-65504, 65504).half()
    return FixedCode(
        width, stored.to(torch.uint8).numpy(), scales.half().numpy(), zeros.to(torch.uint8).numpy(), columns,
        halves.numpy(),
    )  # fmt: skip


@dataclass
class _Fit:
    """All units of a model as functions of widths and protected columns.

    Attributes:
        job: the job.
        weights: float32 (rows, cols) by unit name, those that are kept exact left out.
        hessians: of linear layers; the others are rounded to nearest.
        fixed: sections of the units kept exact.
        coded: entropy coded, or as published.
        ranks: by unit and width, columns by falling score.
        made: sections by unit, width and number of protected columns.
    """

    job: Job
    weights: dict[str, Tensor]
    hessians: dict[str, Tensor]
    fixed: dict[str, Section]
    coded: bool
    ranks: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    made: dict[tuple[str, int, int, bool], Section] = field(default_factory=dict)

    def section(self, name: str, width: int, count: int, *, estimate: bool) -> Section:
        """Code a unit at a width with `count` protected columns, or return zeros of about its length."""
        key = (name, width, count, estimate and self.coded)
        if key not in self.made:
            weight, hessian = self.weights[name], self.hessians.get(name)
            if count and hessian is not None and (name, width) not in self.ranks:
                scores = column_scores(weight, hessian, width)
                self.ranks[name, width] = torch.argsort(scores, descending=True, stable=True).tolist()
            weak = self.ranks[name, width][:count] if count else ()
            data = CODER.encode(quantize(weight, hessian, width, weak), coded=self.coded, estimate=estimate)
            self.made[key] = Section(CODER.tag, data)
        return self.made[key]

    def sections(
        self, width: int, other: int, counts: Mapping[str, int], *, estimate: bool = False
    ) -> dict[str, Section]:
        """Code all units: layers at `width` bits, units without a Hessian at `other`."""
        found = dict(self.fixed)
        for n in self.weights:
            bits = width if n in self.hessians else other
            found[n] = self.section(n, bits, counts.get(n, 0), estimate=estimate)
        return {u.name: found[u.name] for u in self.job.model.units}

    def room(self, sections: dict[str, Section]) -> int:
        """Return the bytes left of the budget."""
        return self.job.budget - self.job.size(sections, b"")

    def counts(self, share: float) -> dict[str, int]:
        """Return the protected columns of every layer at a share of its columns."""
        return {n: min(int(share * self.weights[n].shape[1]), _MOST_COLUMNS) for n in self.hessians}


def _widths(fit: _Fit) -> tuple[int, int]:
    """Return the largest width that fits, and that of embeddings, one bit more if that fits too.

    Raises:
        BudgetError: one bit does not fit.
    """
    for width in range(MAX_WIDTH, 0, -1):
        for other in (min(width + 1, MAX_WIDTH), width):
            guess = fit.room(fit.sections(width, other, {}, estimate=True))
            if guess >= -fit.job.budget // 50 and fit.room(fit.sections(width, other, {})) >= 0:
                return width, other
    floor = fit.job.size(fit.sections(1, 1, {}), b"")
    largest = max(fit.job.model.units, key=lambda u: u.parameters)
    raise BudgetError(
        f"owq needs {floor:,} bytes at one bit, the budget is {fit.job.budget:,}; the largest unit is {largest.name}",
        floor,
    )


def _share(fit: _Fit, width: int, other: int) -> dict[str, int]:
    """Return every layer's protected columns at the largest share that fits, by estimates and then real bytes."""
    correction = 0  # estimated less real room
    for _ in range(_REPAIRS):
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            share = (low + high) / 2
            if fit.room(fit.sections(width, other, fit.counts(share), estimate=True)) >= correction:
                low = share
            else:
                high = share
        counts = fit.counts(low)
        room = fit.room(fit.sections(width, other, counts))
        if room >= 0:
            return counts
        correction = fit.room(fit.sections(width, other, counts, estimate=True)) - room
    return fit.counts(0.0)


def _spend(fit: _Fit, width: int, other: int, counts: dict[str, int]) -> dict[str, Section]:
    """Return sections of these counts, adding single columns as long as one fits."""
    sections = fit.sections(width, other, counts)
    left = fit.room(sections)
    for name in [*sorted(fit.hessians, key=lambda n: -len(fit.weights[n]))] * 2:
        nominal = len(fit.weights[name]) * (16 - width) / 8
        full = counts[name] >= min(fit.weights[name].shape[1], _MOST_COLUMNS)
        if full or nominal > 1.2 * left:
            continue
        trial = sections | {name: fit.section(name, width, counts[name] + 1, estimate=False)}
        after = fit.room(trial)
        if 0 <= after < left:
            counts[name] += 1
            sections, left = trial, after
    return sections


def run(job: Job) -> Outcome:
    """Run fixed-width GPTQ with as many protected columns as the cap allows."""
    entropy = coded(job.options)
    hessians, embeddings = second_moments(job)
    with job.reporter.step("width and protected columns", 1) as advance:
        values = matrices(job)
        fixed = exact_sections(job.model.units, values)
        weights = {n: w for n, w in values.items() if n not in fixed}
        known = {n: hessians[n] for n in weights if n in hessians and n not in embeddings}
        fit = _Fit(job, weights, known, fixed, entropy)
        width, other = _widths(fit)
        counts = _share(fit, width, other)
        sections = _spend(fit, width, other, counts)
        advance(1)
    protected, total = sum(counts.values()), sum(weights[n].shape[1] for n in known)
    plan = f"owq {width} bits, embeddings {other}, {protected} of {total} columns protected"
    job.reporter.note(f"{plan}; {fit.room(sections):,} bytes are left")
    return Outcome(sections, b"", math.nan, math.nan, math.nan, plan)
