"""`--method golf` is the quantizer of the Parameter Golf records, the strongest baseline.

Linear layers go through GPTQ with act-order and 1% damping; the step of a row is `k std(row) / 31`, stored as an
fp16 scale; integers are unbounded and brotli-11 packs them. Embeddings, and matrices without a Hessian, are rounded
to nearest with step `k_emb std(row) / 63`. The records chose k 11.5 to 13 and k_emb 14 to 15 for one model and cap;
here `k` is searched so that the cap is met and used.

`k_emb` follows `k` by default, in the published proportion: `15 (k / 12.5)^embedding_power`, power 1. Power 0 keeps
the published 15 whatever the cap, which is the weaker partner wherever the cap forces `k` away from 12.5. KL to the
original in nats per token at equal bytes, tied embedding, standard errors 2 to 5%:

| model | bits per parameter | power 0 | power 1 | power 1.5 |
|---|---|---|---|---|
| 1.4M | 2.5 | 2.74 | 1.96 | 1.75 |
| 1.4M | 3.0 | 0.909 | 0.744 | 0.715 |
| 1.4M | 3.5 | 0.348 | 0.329 | |
| 1.4M | 4.5 | 0.0781 | 0.0766 | 0.0814 |
| 7M, mean of three texts | 2.5 | 0.281 | 0.219 | 0.223 |
| 7M, mean of three texts | 3.5 | 0.0443 | 0.0449 | 0.0449 |

The search runs GPTQ on a sample of rows (rows do not interact, given the Hessian) and takes their entropy as the
size, calibrated by real brotli-11 sizes at the `k` in question, until one `k` fits and one at most 3% finer does
not. Then single tensors, and rows of one, move to the finer `k` until the cap is used up. Brotli-11 took 77 s of a
core for a table of 28M integers, so up to then tables of 4M count at a guess (`golf_coders`, within 0.2% of such ones)
and are coded whole once, before the others fill the rest; again only where a guess was so low that the cap is missed.

Source: Frantar et al., GPTQ (arXiv:2210.17323), from which two details differ, both to its advantage: inputs that
calibration never saw keep their weights (the reference code sets them to zero), and nothing is ever clipped to a
bit width. Every tensor takes the smallest of three coders (`golf_coders`), at most what zpaq -m5 over whole roles
takes; the record's low-rank residual on three tensors is an option, see LOG.md for what it costs here.

>>> weight = torch.tensor([[0.9, -0.2, 0.4, 0.0], [0.1, 0.7, -0.6, 0.3]])
>>> gptq(weight, factorize(torch.eye(4, dtype=torch.float64)), row_steps(weight, 31.0)).codes.tolist()
[[2, 0, 1, 0], [0, 1, -1, 1]]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.errors import BudgetError
from bytecap.format.coders.packed import MAX_CODE, Quantized
from bytecap.job import Section
from bytecap.methods.baselines.golf_coders import WRITERS, Coding, is_large, with_brotli
from bytecap.methods.baselines.gptq import Factor, factorize, feedback, reciprocal
from bytecap.methods.baselines.residual import Residual
from bytecap.methods.baselines.uniform import (
    CodedMatrix,
    Progress,
    exact_sections,
    fill,
    measure,
    tolerance,
    total,
)
from bytecap.quantization.ahead import of_one_shape
from bytecap.types import Unit

LINEAR_LEVELS, EMBEDDING_LEVELS = 31, 63
K, K_EMBEDDING = 12.5, 15.0  # as published
_FINEST, _COARSEST = 0.01, 400.0  # k: about 13 bits a weight; next to nothing left but the outliers
_SAMPLE_ROWS = 256  # of every matrix, for estimates
_CLOSE = 1.03  # largest ratio of the two k that are mixed in the end
_REFILLS = 4
_TOGETHER = 2**28  # weights and Hessian entries of matrices that are rounded together

Coded = dict[str, CodedMatrix]


def row_steps(weight: Tensor, k: float, levels: int = LINEAR_LEVELS) -> Tensor:
    """Return the steps `k std(row) / levels` of weights (rows, cols), float16 (rows,).

    A row without spread takes its magnitude instead; a step is never so fine that codes outgrow two bytes.
    """
    spread = weight.std(dim=1, correction=0)
    peak = weight.abs().amax(dim=1)
    spread = torch.where(spread > 1e-4 * peak, spread, peak)
    step = torch.maximum(spread * (k / levels), peak * (1.001 / MAX_CODE))
    half = torch.finfo(torch.float16)
    smallest = torch.where(peak > 0, half.smallest_normal / 1024, 0.0)  # rows of zeros keep a step of zero
    return torch.maximum(step, smallest).clamp(max=half.max).half()


def _codes(value: Tensor, inverse: Tensor) -> Tensor:
    return torch.round(value * inverse).clamp_(-MAX_CODE, MAX_CODE)


def _quantized(codes: Tensor, steps: Tensor) -> Quantized:
    small = bool(codes.abs().max() <= 127) if codes.numel() else True
    return Quantized(codes.to(torch.int8 if small else torch.int16).contiguous().cpu().numpy(), steps.cpu().numpy())


def round_nearest(weight: Tensor, steps: Tensor) -> Quantized:
    """Round weights (rows, cols) to the nearest integers at fp16 steps (rows,)."""
    return _quantized(_codes(weight, reciprocal(steps.float())[:, None]), steps)


def gptq(weight: Tensor, factor: Factor, steps: Tensor) -> Quantized:
    """Round weights (rows, cols) at fp16 steps (rows,), feeding every column's error back to the later ones."""
    return _quantized(_gptq(weight, factor, steps), steps)


def _gptq(weight: Tensor, factor: Factor, steps: Tensor) -> Tensor:
    """Codes (..., rows, cols) of one matrix or several, at fp16 steps (..., rows)."""
    most = torch.tensor(float(MAX_CODE), device=weight.device)
    return feedback(weight, factor, steps.float(), -most, most)[0]


def entropy_bytes(codes: npt.NDArray[np.integer[Any]]) -> float:
    """Return the bytes of integers under an ideal coder of their own histogram."""
    wide = codes.reshape(-1).astype(np.int32)
    counts = np.bincount(wide - wide.min(initial=0)).astype(np.float64)
    counts = counts[counts > 0]
    return float(counts @ np.log2(wide.size / counts)) / 8 if wide.size else 0.0


@dataclass
class StepSearch:
    """All matrices of a model as functions of `k`.

    Attributes:
        weights: float32 (rows, cols) by unit name.
        factors: of the linear layers; the others are rounded to nearest.
        power: `embedding_power`.
        write: makes sections.
        overhead: coded over estimated size, from the last coding (large tables guessed).
        excess: real over guessed size of large matrices, where a guess was too low.
    """

    weights: dict[str, Tensor]
    factors: dict[str, Factor]
    power: float
    write: Coding = with_brotli
    overhead: float = 1.01
    excess: dict[str, float] = field(default_factory=dict)

    def quantize(self, name: str, k: float, stride: int = 1) -> Quantized:
        """Quantize one matrix, or every `stride`-th row of it, at `k`."""
        weight = self.weights[name][::stride]
        if name in self.factors:
            return gptq(weight, self.factors[name], row_steps(weight, k))
        k_embedding = K_EMBEDDING * (k / K) ** self.power
        return round_nearest(weight, row_steps(weight, k_embedding, EMBEDDING_LEVELS))

    def there(self, weight: Tensor) -> bool:
        """Return whether a matrix lies where matrices are better rounded together."""
        return weight.is_cuda

    def quantized(self, k: float, strides: Mapping[str, int]) -> Iterator[tuple[str, Quantized]]:
        """Yield all matrices at `k`, or rows of each at a stride; on a GPU those of one shape are rounded together."""
        weights = {n: w[:: strides.get(n, 1)] for n, w in self.weights.items()}
        together = dict.fromkeys(n for n, w in weights.items() if n in self.factors and self.there(w))
        yield from ((n, self.quantize(n, k, strides.get(n, 1))) for n in weights if n not in together)
        for names in of_one_shape(together, lambda n: (len(weights[n]), weights[n].shape[1]), _TOGETHER):
            steps = torch.stack([row_steps(weights[n], k) for n in names])
            factor = Factor.stacked([self.factors[n] for n in names])
            codes = _gptq(torch.stack([weights[n] for n in names]), factor, steps)
            yield from ((n, _quantized(c, s)) for n, c, s in zip(names, codes, steps, strict=True))

    def estimate(self, k: float) -> float:
        """Estimate the bytes of all sections at `k`, before calibration."""
        strides = {n: max(1, len(w) // _SAMPLE_ROWS) for n, w in self.weights.items()}
        found = {n: (entropy_bytes(q.codes), max(1, len(q.codes))) for n, q in self.quantized(k, strides)}
        size = 0.0
        for name, weight in self.weights.items():
            sampled, rows = found[name]
            size += sampled * len(weight) / rows + 1.5 * len(weight) + 16
        return size

    def solve(self, target: float, start: float) -> float:
        """Solve for the `k` whose estimated size is `target` bytes within 0.05%, or take the range's nearest end."""
        fine, coarse = math.log(_FINEST), math.log(_COARSEST)
        slope = -sum(w.numel() for w in self.weights.values()) / (8 * math.log(2))  # bytes per e-fold, at high rate
        x = min(max(math.log(start), fine), coarse)
        tried: dict[float, float] = {}
        for _ in range(40):
            size = tried[x] = self.overhead * self.estimate(math.exp(x))
            fine, coarse = (x, coarse) if size > target else (fine, x)
            if abs(size - target) <= 5e-4 * target or coarse - fine < 1e-6:
                break
            if len(tried) > 1:
                a, b = list(tried)[-2:]
                slope = min((tried[b] - tried[a]) / (b - a), slope / 100)
            x = min(max(x + (target - size) / slope, fine), coarse)
            if x in tried:
                x = (fine + coarse) / 2
        return math.exp(x)

    def measure(self, k: float) -> Coded:
        """Code sections at `k`, where those of large matrices may be guesses, and calibrate the estimate on them."""
        matrices = dict(self.quantized(k, {}))
        found = measure({n: matrices[n] for n in self.weights}, partial(self.write, about=True))
        for name, more in self.excess.items():
            found[name] = replace(found[name], data=bytes(math.ceil(more * len(found[name].data))))
        self.overhead = total(found) / max(1.0, self.estimate(k))
        return found

    def whole(self, low: Coded, high: Coded, room: int) -> Coded:
        """Code large matrices whole, those that fit into `room` bytes more than `low` takes as in `high`."""
        large = {}
        for name in sorted((n for n in low if is_large(low[n].matrix)), key=lambda n: -len(low[n].data)):
            gain = len(high[name].data) - len(low[name].data) if high else 0
            large[name] = high[name] if high and gain <= room else low[name]
            room -= gain if large[name] is high.get(name) else 0
        found = measure({n: p.matrix for n, p in large.items()}, self.write)
        for name, part in found.items():
            if len(part.data) > len(large[name].data):
                self.excess[name] = 1.0005 * len(part.data) / len(large[name].data) * self.excess.get(name, 1.0)
        return found


def _coded_large(search: StepSearch, room: int, report: Progress) -> tuple[Coded, Coded, Coded, float]:
    """Bracket `room` bytes as `_bracket` does, and code large matrices whole; returns those as well.

    Where a guess was too low, it is corrected and the bracket is sought again.
    """
    while True:
        low, high, k = _bracket(search, room, report)
        large = search.whole(low, high, room - total(low))
        if total(low | large) <= room:
            return low | large, high | large if high else {}, large, k


def _bracket(search: StepSearch, room: int, report: Progress) -> tuple[Coded, Coded, float]:
    """Bracket `room` bytes by real codings at most 3% apart in `k`; returns both and the finer `k`.

    The second is empty if the finest `k` fits.

    Raises:
        BudgetError: the coarsest `k` does not fit; `.floor` is its size.
    """
    fits: tuple[float, Coded] = (math.inf, {})
    over: tuple[float, Coded] = (0.0, {})
    k, margin = search.solve(room, K), 0.002
    while True:
        found = search.measure(k)
        report(0)
        if total(found) <= room:
            fits, target = (k, found), room * (1 + margin)
            if k <= _FINEST * 1.001:
                return found, {}, k
        else:
            over, target = (k, found), room * (1 - margin)
            if k >= _COARSEST * 0.999:
                raise BudgetError(f"golf needs {total(found):,} bytes at its coarsest, {room:,} are left", total(found))
        if fits[1] and over[1] and fits[0] <= over[0] * _CLOSE:
            return fits[1], over[1], over[0]
        k, margin = search.solve(target, k), 2 * margin
        if fits[1] and over[1] and not over[0] < k < fits[0]:
            k = math.sqrt(fits[0] * over[0])


def golf_sections(
    units: Sequence[Unit],
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    embeddings: set[str],
    capacity: int,
    progress: Progress | None = None,
    *,
    embedding_power: float = 1.0,
    coder: str = "best",
    residual: Residual | None = None,
    device: str = "cpu",
) -> dict[str, Section]:
    """Code all units with the record-shaped quantizer in at most `capacity` bytes.

    Args:
        units: of the model.
        weights: float32 (rows, cols) by unit name, vectors as one row.
        hessians: float64 (cols, cols) second moments of the inputs of linear layers, of any scale.
        embeddings: names of embedding tables, tied heads included: rounded to nearest.
        capacity: bytes for all sections together.
        progress: called with 0 after every `k` measured for real and with 1 at the end.
        embedding_power: how `k_emb` follows `k`; 0 keeps it at the published 15.
        coder: "best" of brotli, brotli over sorted rows and `bands` for every tensor, or "brotli" for all.
        residual: a low-rank residual on the tensors of largest error; none by default.
        device: that rounds.

    Raises:
        BudgetError: even the coarsest `k` does not fit; `.floor` is the size it needs.
    """
    sections = exact_sections(units, weights)
    fixed = sum(len(s.data) for s in sections.values()) + (residual.bytes(units, hessians) if residual else 0)
    matrices = {u.name: weights[u.name].detach().float().cpu() for u in units if u.name not in sections}
    linear = [n for n in matrices if n in hessians and n not in embeddings]
    factors = {n: factorize(hessians[n].to(device)) for n in linear}
    there = {n: w.to(device) for n, w in matrices.items()}
    search = StepSearch(there, factors, embedding_power, WRITERS[coder])
    report: Progress = progress if progress is not None else lambda _: None
    try:
        low, high, large, k = _coded_large(search, capacity - fixed, report) if matrices else ({}, {}, {}, K)
    except BudgetError as exc:
        floor = exc.floor + fixed
        raise BudgetError(f"golf needs {floor:,} bytes at its coarsest, {capacity:,} are left", floor) from exc
    allowed = tolerance(capacity)
    for _ in range(_REFILLS if high else 0):
        room = capacity - fixed - total(low)
        largest_first = dict(sorted(low.items(), key=lambda item: -len(item[1].data)))
        low = fill(largest_first, high, room, write=search.write, enough=allowed // 4)
        if capacity - fixed - total(low) <= allowed:
            break
        k /= _CLOSE
        high = search.measure(k) | large
    if fixed + total(low) > capacity:
        raise BudgetError(f"golf needs {fixed:,} bytes for vectors alone, {capacity:,} are left", fixed)
    report(1)
    sections |= {n: Section(part.tag, part.data) for n, part in low.items()}
    if residual:
        linear_only = {n: low[n].matrix for n in linear}
        sections |= residual.over(sections, units, matrices, linear_only, hessians)
    return {u.name: sections[u.name] for u in units}
