"""`--method cluscomp` makes codebooks by k-means, freezes codes, and tunes codebooks block by block, after ClusComp.

Every matrix is cut into vectors of `g` neighbouring weights of a row, which k-means maps to `n` codewords. Then the
codes stay as they are and the *codewords* are tuned, one block after the other, until the block's output comes close
to the original's (`recovery/blocks.py`).

Fitted to the cap by `n` and `g` of every matrix: `log2(n) / g` bits a weight for indices and `16 n g` bits for the
codebook. On a small model the second term decides: it is priced like everything else, so small matrices end up with
`g` of 1 or 2. The embedding is coded in the same way, inside the budget. What the paper leaves open: how `n` and `g`
are chosen under a byte cap (here: one slope, `methods/baselines/sampled_curves.py`).

Accounting `published`: f16 codewords, indices packed at whole bits. `coded`: 8-bit codewords, indices entropy coded
where that is shorter.

On a small model a codebook of every matrix's own costs too much, so codewords may also be shared by all matrices
(`methods/baselines/shared_codewords.py`): the plan is solved with and without, by bytes and predicted nats, and
matrices still choose between the shared and an own codebook. `shared=False` is the paper's form. Block by block,
recovery tunes own codewords and the scales of shared ones; then all of them are tuned end to end, which the paper
leaves optional.

Source: ClusComp (ACL 2025). Omitted: end-to-end tuning where nothing is shared. Off by default, as in the
paper: weighting k-means by sensitivity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.allocation.allocate import lower_hull
from bytecap.errors import UsageError
from bytecap.format.coders.codebook import CODER, MAX_DIMENSION, Codebook, look_up
from bytecap.format.wire.indices import MAX_CODEWORDS, by_use, indices_size, width_of
from bytecap.format.wire.shared_objects import write_codebook
from bytecap.job import Job, Outcome, Section
from bytecap.methods.baselines import kmeans, shared_codewords
from bytecap.methods.baselines.sampled_curves import (
    Coded,
    Material,
    entropy_bits,
    finish,
    option,
    prepare,
    sampled,
)
from bytecap.recovery.blocks import Part, recover, whole
from bytecap.types import Curve, Point

OPTIONS: dict[str, Any] = {
    "accounting": "coded", "g": None, "n": None, "recover": 40, "weighted": False, "shared": True,
}  # fmt: skip
DIMENSIONS = (1, 2, 3, 4, 6, 8)
_AROUND = 1.6  # bits per weight on both sides of the mean rate that are tried
_FINE = 4  # settings an octave of n, between measured ones
_MOST_SAMPLED = 128  # codewords that are tried out on samples
_SAMPLE = 24  # vectors a codeword that estimates are made from


@dataclass(frozen=True)
class CodebookSetting:
    """Codewords and their dimension."""

    n: int
    g: int

    @property
    def number(self) -> float:
        """The setting as a curve holds it."""
        return float(self.g * MAX_CODEWORDS * 2 + self.n)

    @staticmethod
    def of(number: float) -> CodebookSetting:
        """The inverse of `number`."""
        return CodebookSetting(int(number) % (MAX_CODEWORDS * 2), int(number) // (MAX_CODEWORDS * 2))


def check(material: Material, n: int, g: int) -> None:
    """Refuse a codebook that cannot be, or that is larger than its tensor.

    Raises:
        UsageError: with the tensor and the numbers.
    """
    rows, cols = material.unit.matrix_shape
    if not (1 <= g <= MAX_DIMENSION and 1 <= n <= MAX_CODEWORDS):
        raise UsageError(f"a codebook has 1 to {MAX_CODEWORDS} codewords of 1 to {MAX_DIMENSION}, not {n} of {g}")
    if n * g > rows * cols:
        raise UsageError(
            f"a codebook of {n} x {g} = {n * g:,} values is larger than its tensor {material.unit.name} "
            f"of {rows} x {cols} = {rows * cols:,}"
        )
    if g > cols:
        raise UsageError(f"vectors of {g} are longer than the rows of {material.unit.name}, which have {cols}")


def settings(material: Material, rate: float, options: dict[str, Any]) -> list[CodebookSetting]:
    """Return settings near `rate` bits a weight whose codebooks take at most half the tensor."""
    found = []
    values, cols = material.weight.numel(), material.weight.shape[1]
    for g in (options["g"],) if options["g"] else DIMENSIONS:
        if options["n"]:
            if options["g"] or (g <= cols and options["n"] * g <= values):
                check(material, options["n"], g)
                found.append(CodebookSetting(options["n"], g))
            continue
        if options["g"]:
            check(material, 1, g)
        for power in range(17):
            n = 2**power
            side = 8 * book_bytes(n, g, options) / values
            low = abs(power / g + side - rate) < _AROUND or power <= 1
            if g <= cols and 2 * n * g <= values and low and power < 14:
                found.append(CodebookSetting(n, g))
    if options["n"] and not found:
        check(material, options["n"], 1)
    return found or [CodebookSetting(1, 1)]


def book_bytes(n: int, g: int, options: dict[str, Any]) -> int:
    """Return the bytes of a codebook."""
    return n * g * (1 if options["accounting"] == "coded" else 2)


def curve(material: Material, rate: float, options: dict[str, Any], seed: int) -> Curve:
    """Estimate points of a matrix from samples, and for many codewords from the slope of fewer ones."""
    coded, measured = options["accounting"] == "coded", dict[CodebookSetting, Point]()
    seen: dict[CodebookSetting, tuple[float, float]] = {}
    for s in settings(material, rate, options):
        m = min(s.n, _MOST_SAMPLED)
        small = CodebookSetting(m, s.g)
        if small not in seen:
            seen[small] = _sampled(material, small, seed)
        error, bits = seen[small]
        error *= (m / s.n) ** (2 / s.g)  # what every vector quantizer tends to at high rate
        bits = min(bits + math.log2(s.n / m), math.log2(s.n)) if coded else (s.n - 1).bit_length()
        count = material.weight.shape[0] * -(-material.weight.shape[1] // s.g)
        size = 8 + (min(s.n, 96) if coded else 0) + book_bytes(s.n, s.g, options) + count * bits / 8
        measured[s] = Point(size, material.price * error, s.number)
    points = list(measured.values())
    if coded and not options["n"]:
        points += _between(measured)
    return Curve(material.unit.name, tuple(points))


def _sampled(material: Material, s: CodebookSetting, seed: int) -> tuple[float, float]:
    """Estimate (squared error, bits of an index) from vectors that the codewords have not seen."""
    generator = torch.Generator().manual_seed(seed)
    few = sampled(material.weight, generator, max(2 * _SAMPLE * s.n * s.g, 4096))
    vectors = kmeans.vectors_of(few, s.g)
    vectors = vectors[torch.randperm(len(vectors), generator=generator).to(vectors.device)]
    limit = max(_SAMPLE * s.n, 2048)
    words = kmeans.fit(vectors[:limit], s.n, generator, iterations=8)
    held = vectors[-limit:]
    index = kmeans.assign(held, words)
    error = float((held - words[index]).square().mean()) * material.weight.numel()
    return error, entropy_bits(index, s.n)


def _between(measured: dict[CodebookSetting, Point]) -> list[Point]:
    """Interpolate points between powers of two, with rate and log distortion straight over log n."""
    found: dict[CodebookSetting, Point] = {}
    for s, low in measured.items():
        high = measured.get(CodebookSetting(2 * s.n, s.g))
        if high is None:
            continue
        for i in range(1, _FINE):
            t = i / _FINE
            n = round(s.n * 2**t)
            if s.n < n < 2 * s.n:
                worse, better = max(low.distortion, 1e-30), max(high.distortion, 1e-30)
                rate = (1 - t) * low.rate + t * high.rate
                found[CodebookSetting(n, s.g)] = Point(
                    rate, worse ** (1 - t) * better**t, CodebookSetting(n, s.g).number
                )
    return list(found.values())


def _vector_weights(material: Material, g: int) -> Tensor:
    """Return the importance of every vector: that of its row times the mean of its columns'."""
    full = material.rows[:, None] * material.columns[None]
    return kmeans.vectors_of(full, g).mean(1)


@dataclass(frozen=True, eq=False)
class Common:
    """A matrix in shared codewords: indices (count,), the scale, and the vectors' codewords (n, g)."""

    indices: npt.NDArray[np.int64]
    scale: float
    words: Tensor


@dataclass(frozen=True)
class ClusComp(shared_codewords.FamilySettings):
    """The family of codings with a codebook for each matrix, or one for all."""

    name: str = "cluscomp"

    def encode(self, material: Material, setting: float) -> Coded[Codebook | Common]:
        """Fit a codebook to the whole matrix, or take the shared one."""
        if self.system is not None and setting >= shared_codewords.BASE:
            words, scale = (
                self.system.words,
                shared_codewords.stored_scale(material.weight, int(setting) - shared_codewords.BASE),
            )
            indices, found = self.system.code(material.weight, scale)
            size = 8 + indices_size(indices, len(words), coded=self.coded)
            return Coded(size, material.distortion(found), Common(indices, scale, words))
        s, shape = CodebookSetting.of(setting), material.unit.matrix_shape
        vectors = kmeans.vectors_of(material.weight, s.g)
        weights = _vector_weights(material, s.g) if self.options["weighted"] else None
        words, index = kmeans.quantize(vectors, s.n, torch.Generator().manual_seed(self.seed), weights)
        book = Codebook(words.cpu().numpy(), index.cpu().numpy())
        values = torch.from_numpy(look_up(shared_codewords.rounded(book.words, byte=self.coded), book.indices, shape))
        side = 4 + book_bytes(s.n, s.g, self.options)
        size = side + indices_size(by_use(book.indices, s.n)[1], s.n, coded=self.coded)
        return Coded(size, material.distortion(values.to(material.weight.device)), book)

    def section(self, material: Material, kept: Codebook | Common) -> Section:
        """Return a matrix's section."""
        if isinstance(kept, Common):
            n, g = kept.words.shape
            return Section(CODER.tag, CODER.encode_shared(kept.indices, (n, g), 0, kept.scale, coded=self.coded))
        return Section(CODER.tag, CODER.encode(kept, material.unit.matrix_shape, byte=self.coded, coded=self.coded))

    def kind(self, setting: float) -> int:
        """The dimension."""
        return shared_codewords.BASE if setting >= shared_codewords.BASE else CodebookSetting.of(setting).g

    def curve(self, material: Material, rate: float) -> Curve:
        """Estimate points of a matrix with a codebook of its own."""
        return curve(material, rate, self.options, self.seed)

    def systems(self, materials: Sequence[Material], rate: float) -> list[shared_codewords.System]:
        """Return the candidates of shared codewords."""
        return [
            shared_codewords.book(materials, n, d, byte=self.coded, seed=self.seed)
            for n, d in shared_codewords.sizes(rate)
        ]

    def sharing(self, system: shared_codewords.System) -> ClusComp:
        """Return the family whose matrices may use a system."""
        return replace(self, system=system)

    def common(self, materials: Sequence[Material], system: shared_codewords.System) -> list[Curve]:
        """Return points of every matrix in the system's codewords, without the cost of shared objects."""
        n, g = system.words.shape
        found = []
        for m in materials:
            points = []
            for step in range(len(shared_codewords.STEPS)) if m.weight.shape[1] >= g else ():
                error, bits = shared_codewords.estimate(m.weight, system, step, self.seed)
                count = m.weight.shape[0] * -(-m.weight.shape[1] // g)
                size = 8 + (min(n, 96) + count * bits / 8 if self.coded else count * width_of(n) / 8)
                points.append(Point(size, m.price * error, float(shared_codewords.BASE + step)))
            found.append(Curve(m.unit.name, tuple(lower_hull(points))))
        return found


def part(material: Material, book: Codebook | Common, words: Tensor | None = None) -> Part:
    """Return the codebook, or the scale of a shared one, as a tunable part; `words` (n, g) are the current values."""
    device = material.weight.device
    if isinstance(book, Common):
        rows, cols = material.unit.matrix_shape
        which = torch.from_numpy(book.indices).to(device)
        scale = torch.tensor([book.scale], device=device).requires_grad_()
        base = book.words if words is None else words
        return Part(
            material.unit, [scale], lambda: base[which].reshape(rows, -1)[:, :cols] * scale, spread=book.scale / 10
        )
    words = torch.from_numpy(book.words).to(device).clone().requires_grad_()
    index = torch.from_numpy(np.asarray(book.indices, np.int64)).to(device)
    rows, cols = material.unit.matrix_shape
    return Part(material.unit, [words], lambda: words[index].reshape(rows, -1)[:, :cols])


def run(job: Job) -> Outcome:
    """Choose codebooks under the cap, then tune them."""
    options = option(job.options, OPTIONS, "cluscomp")
    materials, stored = prepare(job)
    if options["n"] and options["g"]:
        for m in materials:
            check(m, options["n"], options["g"])
    family = ClusComp(options, job.seed)
    choice, system = shared_codewords.choose_shared(job, family, materials, stored)
    commons = [n for n, k in choice.kept.items() if isinstance(k, Common)]
    objects = system.objects() if system is not None and commons else ()
    sections = {**stored, **choice.sections}
    if options["recover"] and not job.dry_run:
        base = system.words.clone().requires_grad_() if system is not None and commons else None
        parts = {m.unit.name: part(m, choice.kept[m.unit.name], base) for m in materials}
        tuned = recover(job, parts, steps=options["recover"])
        if base is not None and whole(job, parts, [base], steps=options["recover"]):
            tuned, objects = set(parts), (write_codebook(base.detach().cpu().numpy(), byte=family.coded),)
        for n in tuned:
            sections[n] = _tuned(sections[n], parts[n], choice.kept[n])
    return finish(job, choice, sections, f"cluscomp, {len(commons)} of {len(materials)} shared", objects)


def _tuned(section: Section, part: Part, kept: Codebook | Common) -> Section:
    """Return a section with its tuned codewords or scale."""
    found = part.tensors[0].detach().cpu().numpy()
    if isinstance(kept, Common):
        return Section(CODER.tag, CODER.with_scale(section.data, part.unit.matrix_shape, float(found[0])))
    return Section(CODER.tag, CODER.with_words(section.data, kept, found))
