"""`--method reallm` stores codewords for a small decoder plus a low-rank part that is tuned, after ReALLM.

    W = D(VQ(latent)) + L1 L2^T

`L1 L2^T` are the leading singular directions of the weight; k-means codes what they leave. Then the low-rank part is
tuned block by block against the original's outputs (`recovery/blocks.py`), codes and decoder frozen.

Fitted to the cap by bits per latent coordinate (`log2(n) / d`), `d`, rank, and what a matrix shares: all are points of
one curve for each matrix, and real bytes decide. Three forms of D are offered:

- shared by the whole model, as in the paper: an encoder and a decoder trained together over patches of all matrices,
  then their latents' codewords, which are shared too (`methods/baselines/shared_codewords.py`). The paper's decoder is
  deep and convolutional; here it is one hidden layer beside a linear map, because its bytes count in a file of this
  size;
- shared codewords without decoder, the special case to beat;
- own codewords, without decoder, or with a small one trained with the codes frozen, if that costs at most a fiftieth.

`shared=False` leaves the first two out, `decoder=True` all without a decoder, `decoder=False` all with one;
`decoder="shared"` leaves the first and own codewords without decoder, so that the shared decoder stands apart: with its
bytes as a fixed charge against plain VQ and low rank alone, at equal bytes (`benchmarks/decoder.py`).

Accounting `published`: f16 codewords and factors, indices at whole bits. `coded`: 8-bit ones, indices entropy coded
where that is shorter. Decoder weights have 8 bits in both.

Source: ReALLM (arXiv:2405.13155). Omitted: global tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytecap.allocation.allocate import lower_hull
from bytecap.errors import UsageError
from bytecap.format.coders import FloatArray
from bytecap.format.coders.codebook import look_up
from bytecap.format.coders.latent import CODER, Decoder, Latent, Link, decode_patches, decoder_bytes
from bytecap.format.wire.indices import by_use, indices_size, numbers_size
from bytecap.job import Job, Outcome, Section
from bytecap.methods.baselines import cluscomp, kmeans, shared_codewords
from bytecap.methods.baselines.sampled_curves import Coded, Material, finish, option, prepare
from bytecap.recovery.blocks import Part, recover
from bytecap.types import Curve, Point

OPTIONS: dict[str, Any] = {
    "accounting": "coded", "g": None, "n": None, "rank": None, "decoder": "auto", "recover": 40, "weighted": False,
    "shared": True,
}  # fmt: skip
RANKS = (1, 2, 4, 8)  # never 0 by itself: recovery would have nothing to tune
PATCH, HIDDEN, BITS = 16, 16, 8
_STEPS, _BATCH = 60, 4096  # of the decoder's training, in steps and patches
_SHARE = 0.02  # of a section that an automatic decoder may take
_FACTOR = 1 << 32  # settings are the codebook's number, then rank and decoder


def pack_setting(base: float, rank: int, *, decoder: bool) -> float:
    """Pack a codebook's setting, a rank and a decoder into one number that a float holds exactly."""
    return base + _FACTOR * (2 * rank + decoder)


def unpack_setting(setting: float) -> tuple[cluscomp.CodebookSetting, int, bool]:
    """Unpack (codebook's setting, rank, whether there is a decoder)."""
    more, base = divmod(int(setting), _FACTOR)
    return cluscomp.CodebookSetting.of(base), more // 2, bool(more % 2)


def check_rank(material: Material, rank: int) -> None:
    """Refuse a rank above a matrix' dimensions.

    Raises:
        UsageError: with the tensor and the numbers.
    """
    rows, cols = material.unit.matrix_shape
    if not 0 <= rank <= min(rows, cols):
        raise UsageError(f"rank {rank} is above the dimension of {material.unit.name}, which is {rows} x {cols}")


@dataclass(frozen=True, eq=False)
class Kept:
    """A matrix as codewords, decoder and low-rank part; the part that is not low-rank; its scale if shared."""

    latent: Latent
    base: FloatArray
    scale: float | None = None


@dataclass(frozen=True)
class ReALLM(shared_codewords.FamilySettings):
    """The family of codings."""

    name: str = "reallm"

    def encode(self, material: Material, setting: float) -> Coded[Kept]:
        """Encode a matrix: first the low-rank part, then codewords for the rest, then a decoder for the codes."""
        s, rank, with_decoder = unpack_setting(setting)
        if self.system is not None and setting % _FACTOR >= shared_codewords.BASE:
            return self._encode_shared(material, self.system, int(setting % _FACTOR) - shared_codewords.BASE, rank)
        shape, generator = material.unit.matrix_shape, torch.Generator().manual_seed(self.seed)
        factors, stored, rest = self._low_rank(material, rank)
        words, index = kmeans.quantize(kmeans.vectors_of(rest, s.g), s.n, generator)
        exact = shared_codewords.rounded(words.cpu().numpy(), byte=self.coded)
        indices, decoder = index.cpu().numpy(), None
        base = look_up(exact, indices, shape)
        if with_decoder:
            decoder = train(
                kmeans.vectors_of(torch.from_numpy(base), PATCH), kmeans.vectors_of(rest.cpu(), PATCH), generator
            )
            base = patches_to_matrix(
                decode_patches(decoder, kmeans.vectors_of(torch.from_numpy(base), PATCH).numpy()), shape
            )
        values = base if stored is None else base + stored[0] @ stored[1].T
        size = (
            6
            + indices_size(by_use(indices, s.n)[1], s.n, coded=self.coded)
            + self._side(shape, s, rank, decoder=with_decoder)
        )
        distortion = material.distortion(torch.from_numpy(values).to(material.weight.device))
        return Coded(size, distortion, Kept(Latent(words.cpu().numpy(), indices, decoder, *factors), base))

    def _low_rank(
        self, material: Material, rank: int
    ) -> tuple[tuple[FloatArray | None, FloatArray | None], list[FloatArray] | None, Tensor]:
        """Return (factors, factors as stored, the rest of the weight)."""
        if not rank:
            return (None, None), None, material.weight
        left, right = (f.cpu().numpy() for f in low_rank(material.weight, rank))
        stored = [shared_codewords.rounded(f.T, byte=self.coded).T for f in (left, right)]
        return (
            (left, right),
            stored,
            material.weight - torch.from_numpy(stored[0] @ stored[1].T).to(material.weight.device),
        )

    def _encode_shared(self, material: Material, system: shared_codewords.System, step: int, rank: int) -> Coded[Kept]:
        """Encode a matrix: first the low-rank part, then the shared system for the rest."""
        factors, stored, rest = self._low_rank(material, rank)
        scale = shared_codewords.stored_scale(material.weight, step)
        indices, values = system.code(rest, scale)
        n, base = len(system.words), values.cpu().numpy()
        size = 16 + indices_size(indices, n, coded=self.coded)
        size += sum(numbers_size(rank * k, byte=self.coded) for k in material.unit.matrix_shape) if rank else 0
        whole = base if stored is None else base + stored[0] @ stored[1].T
        distortion = material.distortion(torch.from_numpy(whole).to(rest.device))
        words = system.words.cpu().numpy()
        return Coded(size, distortion, Kept(Latent(words, indices, system.decoder, *factors), base, scale))

    def common(self, materials: Sequence[Material], system: shared_codewords.System) -> list[Curve]:
        """Return points of every matrix in the system's codewords with the smallest allowed rank."""
        n, d = system.words.shape
        rank = RANKS[0] if self.options["rank"] is None else self.options["rank"]
        found = []
        for m in materials:
            points, shape = [], m.unit.matrix_shape
            fits = shape[1] >= system.width and rank <= min(shape) // 2
            share = 1 - float(
                torch.linalg.svdvals(m.weight)[:rank].square().sum() / m.weight.square().sum().clamp(min=1e-30)
            )
            for step in range(len(shared_codewords.STEPS)) if fits else ():
                error, bits = shared_codewords.estimate(m.weight, system, step, self.seed)
                count = shape[0] * -(-shape[1] // system.width) * system.width // d
                size = 16 + (min(n, 96) + count * bits / 8 if self.coded else count * (n - 1).bit_length() / 8)
                size += sum(numbers_size(rank * k, byte=self.coded) for k in shape) if rank else 0
                setting = pack_setting(float(shared_codewords.BASE + step), rank, decoder=False)
                points.append(Point(size, m.price * error * (share if not self.coded else 1.0), setting))
            found.append(Curve(m.unit.name, tuple(lower_hull(points))))
        return found

    def systems(self, materials: Sequence[Material], rate: float) -> list[shared_codewords.System]:
        """Return the candidate systems, with a decoder and without."""
        found, wanted = [], self.options["decoder"]
        for n, d in shared_codewords.sizes(rate)[:1]:
            if wanted not in (True, "shared"):
                found.append(shared_codewords.book(materials, n, d, byte=self.coded, seed=self.seed))
            if wanted is not False and shared_codewords.PATCH % d == 0:
                found.append(shared_codewords.autoencoder(materials, n, d, byte=self.coded, seed=self.seed))
        return found

    def sharing(self, system: shared_codewords.System) -> ReALLM:
        """Return the family whose matrices may use a system."""
        return replace(self, system=system)

    def _side(self, shape: tuple[int, int], s: cluscomp.CodebookSetting, rank: int, *, decoder: bool) -> int:
        """Return the bytes of codewords, decoder and factors."""
        size = numbers_size(s.n * s.g, byte=self.coded)
        size += decoder_bytes(PATCH, PATCH, HIDDEN, BITS) if decoder else 0
        return size + (sum(numbers_size(rank * k, byte=self.coded) for k in shape) if rank else 0)

    def section(self, material: Material, kept: Kept) -> Section:
        """Return a matrix's section."""
        latent, coded = kept.latent, self.coded
        byte_factors = coded and latent.left is not None
        shape = material.unit.matrix_shape
        words = decoder = None
        if kept.scale is not None:
            decoder = Link(1, kept.scale) if latent.decoder is not None else None
            words = Link(0, 1.0 if decoder is not None else kept.scale)
        data = CODER.encode(
            latent, shape, byte_words=coded and words is None, byte_factors=byte_factors, bits=BITS, coded=coded,
            words=words, decoder=decoder,
        )  # fmt: skip
        return Section(CODER.tag, data)

    def kind(self, setting: float) -> int:
        """Dimension and decoder."""
        if setting % _FACTOR >= shared_codewords.BASE:
            return shared_codewords.BASE
        s, _, decoder = unpack_setting(setting)
        return 2 * s.g + decoder

    def curve(self, material: Material, rate: float) -> Curve:
        """Estimate points: those of plain codebooks, with the error that a low-rank part leaves."""
        plain = cluscomp.curve(material, rate, self.options, self.seed)
        shape = material.unit.matrix_shape
        energy = torch.linalg.svdvals(material.weight).double().square()
        left = 1 - energy.cumsum(0) / energy.sum().clamp(min=1e-30)
        ranks = RANKS if self.options["rank"] is None else (self.options["rank"],)
        points = []
        for p in plain.points:
            s = cluscomp.CodebookSetting.of(p.setting)
            for rank in sorted(
                {min(r, min(shape) // 2) for r in ranks} if self.options["rank"] is None else set(ranks)
            ):
                share = float(left[rank - 1].clamp(min=1e-6)) if rank else 1.0
                for decoder in self._decoders(material, s, p.rate):
                    more = self._side(shape, s, rank, decoder=decoder) - self._side(shape, s, 0, decoder=False)
                    better = share * (0.99 if decoder else 1.0)
                    setting = pack_setting(p.setting, rank, decoder=decoder)
                    points.append(Point(p.rate + more, p.distortion * better, setting))
        kinds = {self.kind(p.setting) for p in points}
        return Curve(
            plain.name, tuple(p for k in kinds for p in lower_hull([q for q in points if self.kind(q.setting) == k]))
        )

    def _decoders(self, material: Material, s: cluscomp.CodebookSetting, rate: float) -> tuple[bool, ...]:
        """Return whether to offer codewords without a decoder, with one, or both."""
        possible = PATCH % s.g == 0 and material.weight.shape[1] >= PATCH
        wanted = self.options["decoder"]
        if wanted == "auto":
            cheap = decoder_bytes(PATCH, PATCH, HIDDEN, BITS) < _SHARE * rate
            return (False, True) if possible and cheap and s.g > 1 else (False,)
        return (bool(wanted) and wanted != "shared" and possible,)


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return leading singular directions as (rows, rank) and (cols, rank), sharing the singular values evenly."""
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, v[:rank].T * root


def patches_to_matrix(patches: FloatArray, shape: tuple[int, int]) -> FloatArray:
    """Put patches (count, g) in row order together to a matrix (rows, cols)."""
    rows, cols = shape
    return np.ascontiguousarray(patches.reshape(rows, -1)[:, :cols])


def train(latents: Tensor, targets: Tensor, generator: torch.Generator) -> Decoder:
    """Train a decoder from latents (count, e) to patches (count, g); returned as a file gives it back.

    It begins as the identity, so training can only help; Adam on squared error.
    """
    e, g = latents.shape[1], targets.shape[1]
    spread = float(targets.std(correction=0)) or 1.0
    skip = torch.eye(g, e).requires_grad_()
    inner = (torch.randn(HIDDEN, e, generator=generator) / e**0.5).requires_grad_()
    bias = torch.zeros(HIDDEN).requires_grad_()
    outer = torch.zeros(g, HIDDEN).requires_grad_()
    leaves = [skip, inner, bias, outer]
    optimizer = torch.optim.Adam(leaves, lr=3e-3)
    for _ in range(_STEPS):
        few = torch.randint(len(latents), (min(_BATCH, len(latents)),), generator=generator)
        z, w = latents[few] / spread, targets[few] / spread
        optimizer.zero_grad()
        out = z @ skip.T + torch.relu(z @ inner.T + bias) @ outer.T
        (out - w).square().mean().backward()
        optimizer.step()
    arrays = [t.detach().numpy() for t in (skip, inner, bias * spread, outer)]
    return Decoder(*arrays).stored(BITS)


def part(material: Material, kept: Kept) -> Part:
    """Return the low-rank part as a tunable part."""
    device, latent = material.weight.device, kept.latent
    base = torch.from_numpy(kept.base).to(device)
    if latent.left is None or latent.right is None:
        return Part(material.unit, [], lambda: base)
    left = torch.from_numpy(latent.left.copy()).to(device).requires_grad_()
    right = torch.from_numpy(latent.right.copy()).to(device).requires_grad_()
    return Part(material.unit, [left, right], lambda: base + left @ right.T)


def run(job: Job) -> Outcome:
    """Choose latents and low-rank parts under the cap, then tune them."""
    options = option(job.options, OPTIONS, "reallm")
    materials, stored = prepare(job)
    for m in materials:
        if options["rank"] is not None:
            check_rank(m, options["rank"])
        if options["n"] and options["g"]:
            cluscomp.check(m, options["n"], options["g"])
    family = ReALLM(options, job.seed)
    choice, system = shared_codewords.choose_shared(job, family, materials, stored)
    commons = [k for k in choice.kept.values() if k.scale is not None]
    objects = system.objects() if system is not None and commons else ()
    sections = {**stored, **choice.sections}
    if options["recover"] and not job.dry_run:
        parts = {m.unit.name: part(m, choice.kept[m.unit.name]) for m in materials}
        for n in recover(job, parts, steps=options["recover"]):
            if parts[n].tensors:
                factors = [t.detach().cpu().numpy() for t in parts[n].tensors]
                sections[n] = Section(CODER.tag, CODER.with_factors(sections[n].data, job_shape(job, n), *factors))
    decoders = sum(k.latent.decoder is not None for k in choice.kept.values())
    label = f"reallm, {decoders} of {len(materials)} with decoder, {len(commons)} shared"
    return finish(job, choice, sections, label, objects)


def job_shape(job: Job, name: str) -> tuple[int, int]:
    """Shape (rows, cols) of a unit."""
    return next(u.matrix_shape for u in job.model.units if u.name == name)
