"""`--method owq` runs GPTQ at a fixed width and keeps the columns that would suffer most in 16 bits.

For every linear layer, column j scores `s_j = H_jj * sum_i (W - Q(W))_ij^2`, H the second moment of the layer's inputs
and Q round to nearest. The k columns of highest score stay float16. They come last in GPTQ, so that they absorb the
errors of all others; the rest is rounded by an asymmetric quantizer of b bits with one scale and zero point a row,
whose range is fitted without the protected columns by a search over clipped ranges.

Fitting to the cap: b is the largest whole width that fits, embeddings at most one bit above it. Then every layer
protects the same share of its columns (so that each spends the same fraction of its bytes), the largest share that
fits; what is left buys single columns, the most expensive first. Sizes on the way are estimated, beyond 16M weights
from every so many rows, which do not interact, and real sizes correct the estimate.

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
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytecap.errors import BudgetError, UsageError
from bytecap.format.coders.fixed import CODER, FixedCode
from bytecap.format.wire.integers import MAX_WIDTH
from bytecap.job import Job, Outcome, Section
from bytecap.methods.baselines.gptq import Factor, factorize, feedback, reciprocal
from bytecap.methods.baselines.runs import matrices, second_moments
from bytecap.methods.baselines.uniform import exact_sections
from bytecap.methods.rate_control import allowed_slack
from bytecap.quantization.ahead import of_one_shape

_RANGES = 40  # clipped ranges tried for a row, down to a fifth of the whole one
_HALVINGS = 12  # of the share of protected columns
_REPAIRS = 4  # real sizes against estimated ones
_MOST_COLUMNS = 65_535  # what a u16 index reaches
_SAMPLED = 2**24  # weights of a model that sizes are estimated from: rows at a stride
_TOGETHER = 2**28  # weights and Hessian entries of matrices that are rounded together

Wanted = tuple[int, int]  # width, number of protected columns


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
    """Fit scales (..., rows) and zero points of an asymmetric quantizer of `width` bits by least squared error.

    Ranges hold zero and both ends shrink together. Scales are float32 values that float16 holds.

    Args:
        weight: float32 (..., rows, cols).
        width: bits of a code.
    """
    levels = (1 << width) - 1
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    best = torch.full(weight.shape[:-1], math.inf, device=weight.device)
    scales, zeros = torch.zeros_like(best), torch.zeros_like(best)
    for i in range(_RANGES):
        share = 1 - 0.8 * i / _RANGES
        scale = (share * (high - low) / levels).clamp(max=65504).half().float()
        zero = torch.where(scale > 0, torch.round(-share * low / scale), 0.0).clamp(0, levels)
        error = (nearest(weight, scale, zero, width) * scale[..., None] - weight).square().sum(-1)
        better = error < best
        best, scales, zeros = (
            torch.where(better, new, old) for new, old in ((error, best), (scale, scales), (zero, zeros))
        )
    return scales, zeros


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, width: int) -> Tensor:
    """Return the nearest codes minus zero points, (..., rows, cols) as float32."""
    inverse = reciprocal(scales)[..., None]
    levels = (1 << width) - 1
    return torch.minimum(torch.maximum(torch.round(weight * inverse), -zeros[..., None]), (levels - zeros)[..., None])


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
    columns = torch.tensor(weak, dtype=torch.long, device=weight.device)
    factor = None if hessian is None else factorize(hessian, last=weak)
    return stored(rounded(weight, factor, width, columns), width)


def rounded(weight: Tensor, factor: Factor | None, width: int, weak: Tensor) -> tuple[Tensor, ...]:
    """Round one matrix, or several of one shape.

    Args:
        weight: float32 (..., rows, cols).
        factor: of the Hessian; None rounds to nearest. Weak columns that do not come last in its order absorb nothing.
        width: bits of a code.
        weak: columns to protect, (..., k).

    Returns:
        Codes (..., rows, cols - k), scales and zero points (..., rows), protected columns, rising, and their values.
    """
    count, levels = weak.shape[-1], (1 << width) - 1
    plain = weight.shape[-1] - count
    protects = torch.zeros(*weight.shape[:-2], weight.shape[-1], device=weight.device).scatter_(-1, weak, 1.0)
    columns = torch.argsort(protects, stable=True)
    first, last = columns[..., None, :plain], columns[..., None, plain:]
    protected = torch.take_along_dim(weight, last, -1)
    if plain:
        scales, zeros = row_ranges(torch.take_along_dim(weight, first, -1), width)
    else:
        scales = zeros = torch.zeros(weight.shape[:-1], device=weight.device)
    if factor is None or not plain:
        codes = nearest(weight, scales, zeros, width)
    else:
        absorb = count if torch.equal(factor.order[..., plain:].sort(-1).values, last[..., 0, :]) else 0
        codes, kept = feedback(weight, factor, scales, -zeros, levels - zeros, absorb)
        if absorb:
            protected = torch.take_along_dim(kept, torch.argsort(factor.order[..., plain:])[..., None, :], -1)
    return torch.take_along_dim(codes, first, -1) + zeros[..., None], scales, zeros, last[..., 0, :], protected


def stored(found: Sequence[Tensor], width: int) -> FixedCode:
    """Return what `rounded` gives of one matrix as it is stored."""
    codes, scales, zeros, columns, protected = (x.cpu() for x in found)
    halves = protected.clamp(-65504, 65504).half()
    return FixedCode(
        width, codes.to(torch.uint8).numpy(), scales.half().numpy(), zeros.to(torch.uint8).numpy(), columns.tolist(),
        halves.numpy(),
    )  # fmt: skip


@dataclass
class _Fit:
    """All units of a model as functions of widths and protected columns.

    Attributes:
        job: the job.
        weights: float32 (rows, cols) by unit name, those that are kept exact left out, on the device that rounds.
        hessians: of linear layers; the others are rounded to nearest.
        fixed: sections of the units kept exact.
        coded: entropy coded, or as published.
        factors: of the Hessians, no column protected.
        ranks: by unit and width, columns by falling score.
        made: sections by unit, width, number of protected columns and whether they are estimates.
        stride: one row in so many serves estimates.
    """

    job: Job
    weights: dict[str, Tensor]
    hessians: dict[str, Tensor]
    fixed: dict[str, Section]
    coded: bool
    factors: dict[str, Factor] = field(default_factory=dict)
    ranks: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    made: dict[tuple[str, int, int, bool], Section] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stride = max(1, -(-sum(w.numel() for w in self.weights.values()) // _SAMPLED))

    def weak(self, name: str, width: int, count: int) -> list[int]:
        """Return the columns to protect."""
        if count and (name, width) not in self.ranks:
            scores = column_scores(self.weights[name], self.hessians[name], width)
            self.ranks[name, width] = torch.argsort(scores, descending=True, stable=True).tolist()
        return self.ranks[name, width][:count] if count else []

    def factor(self, name: str, weak: Sequence[int], stride: int) -> Factor | None:
        """Return the factor for these columns; in samples of rows the one without any, which gives like sizes."""
        if name not in self.hessians:
            return None
        if weak and stride == 1:
            return factorize(self.hessians[name], last=weak)
        if name not in self.factors:
            self.factors[name] = factorize(self.hessians[name])
        return self.factors[name]

    def codes(self, wanted: Mapping[str, Wanted], stride: int) -> Iterator[tuple[str, FixedCode]]:
        """Yield codes of units at widths and counts, or of rows at a stride; on a GPU those of one shape together."""
        weights = {n: self.weights[n][::stride] for n in wanted}
        together: dict[tuple[bool, Wanted], list[str]] = {}
        for n, w in weights.items():
            together.setdefault(
                (n in self.hessians, wanted[n]) if w.is_cuda else (True, (0, len(together))), []
            ).append(n)
        for members in together.values():
            for names in of_one_shape(members, lambda n: (len(weights[n]), weights[n].shape[1]), _TOGETHER):
                width, count = wanted[names[0]]
                weak = [self.weak(n, width, count) for n in names]
                factors = [f for n, k in zip(names, weak, strict=True) if (f := self.factor(n, k, stride)) is not None]
                columns = [torch.tensor(k, dtype=torch.long, device=weights[names[0]].device) for k in weak]
                if len(names) == 1:
                    found = rounded(weights[names[0]], factors[0] if factors else None, width, columns[0])
                    yield names[0], stored(found, width)
                    continue
                factor = Factor.stacked(factors) if factors else None
                found = rounded(torch.stack([weights[n] for n in names]), factor, width, torch.stack(columns))
                yield from ((n, stored([x[i] for x in found], width)) for i, n in enumerate(names))

    def blanks(self, wanted: Mapping[str, Wanted], stride: int) -> Iterator[tuple[str, FixedCode]]:
        """Yield codes without a value, which as published have the same length."""
        for name, (width, count) in wanted.items():
            rows, cols = self.weights[name][::stride].shape
            zeros = np.zeros(rows, np.uint8)
            codes, protected = np.zeros((rows, cols - count), np.uint8), np.zeros((rows, count), np.float16)
            yield name, FixedCode(width, codes, zeros.astype(np.float16), zeros, range(count), protected)

    def make(self, wanted: Mapping[str, Wanted], *, estimate: bool) -> None:
        """Code those units that are not yet, or zeros of about their length."""
        missing = {n: v for n, v in wanted.items() if (n, *v, estimate) not in self.made}
        stride = self.stride if estimate else 1

        def section(item: tuple[str, FixedCode]) -> Section:
            name, code = item
            data, fixed = CODER.encode(code, coded=self.coded, estimate=estimate), 2 * len(code.columns)
            if stride == 1:
                return Section(CODER.tag, data)
            share = len(self.weights[name]) / max(1, len(code.codes))
            return Section(CODER.tag, bytes(fixed + round((len(data) - fixed) * share)))

        codes = self.blanks(missing, stride) if estimate and not self.coded else self.codes(missing, stride)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            begun = [(item[0], pool.submit(section, item)) for item in codes]
            for name, found in begun:
                self.made[(name, *missing[name], estimate)] = found.result()

    def sections(
        self, width: int, other: int, counts: Mapping[str, int], *, estimate: bool = False
    ) -> dict[str, Section]:
        """Code all units: layers at `width` bits, units without a Hessian at `other`."""
        wanted = {n: (width if n in self.hessians else other, counts.get(n, 0)) for n in self.weights}
        self.make(wanted, estimate=estimate)
        found = self.fixed | {n: self.made[(n, *v, estimate)] for n, v in wanted.items()}
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
    """Return every layer's protected columns at the largest share that fits, by estimates and then real bytes.

    Where estimates are those of some rows they may be too high as well as too low, so the share is sought again there.
    """
    correction, best = 0, (math.inf, fit.counts(0.0))  # estimated less real room; real room and what leaves it
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
        if 0 <= room < best[0]:
            best = room, counts
        if room >= 0 and (fit.stride == 1 or room <= allowed_slack(fit.job.budget)):
            break
        before, correction = correction, fit.room(fit.sections(width, other, counts, estimate=True)) - room
        if room >= 0 and correction == before:
            break
    return best[1]


def _spend(fit: _Fit, width: int, other: int, counts: dict[str, int]) -> dict[str, Section]:
    """Return sections of these counts, adding single columns as long as one fits."""
    sections = fit.sections(width, other, counts)
    left = fit.room(sections)
    for name in [*sorted(fit.hessians, key=lambda n: -len(fit.weights[n]))] * 2:
        nominal = len(fit.weights[name]) * (16 - width) / 8
        full = counts[name] >= min(fit.weights[name].shape[1], _MOST_COLUMNS)
        if full or nominal > 1.2 * left:
            continue
        fit.make({name: (width, counts[name] + 1)}, estimate=False)
        trial = sections | {name: fit.made[name, width, counts[name] + 1, False]}
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
        weights = {n: w.to(job.device) for n, w in values.items() if n not in fixed}
        known = {n: hessians[n].to(job.device) for n in weights if n in hessians and n not in embeddings}
        fit = _Fit(job, weights, known, fixed, entropy)
        width, other = _widths(fit)
        counts = _share(fit, width, other)
        sections = _spend(fit, width, other, counts)
        advance(1)
    protected, total = sum(counts.values()), sum(weights[n].shape[1] for n in known)
    plan = f"owq {width} bits, embeddings {other}, {protected} of {total} columns protected"
    job.reporter.note(f"{plan}; {fit.room(sections):,} bytes are left")
    return Outcome(sections, b"", math.nan, math.nan, math.nan, plan)
