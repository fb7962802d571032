"""Find codewords, and a decoder, that all matrices of a model share, and price them.

A matrix is divided by a scale of its own, cut into vectors, and every vector becomes one of the shared codewords; with
a decoder, a patch goes through an encoder first and its codewords through the decoder afterwards. The scale is also the
rate: a coarser one uses fewer codewords around zero, and the entropy coder takes what that leaves. So one codebook
serves every rate, and its bytes are a fixed charge of the file: the plan is solved with and without it.

Encoder and decoder (ReALLM, arXiv:2405.13155) are trained together on patches of all matrices, each scaled to its own
spread: both begin as the identity, a linear map beside one hidden layer; half of the way latents pass through the
nearest codeword with a straight-through gradient, k-means fits the codewords again, then the decoder alone goes on with
the codes as they are. The paper leaves training and sizes open. Omitted: weighting by sensitivity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bytecap.allocation.allocate import allocate
from bytecap.errors import BudgetError
from bytecap.format.coders import FloatArray
from bytecap.format.coders.latent import Decoder, decode_patches
from bytecap.format.wire.indices import read_numbers, write_numbers
from bytecap.format.wire.shared_objects import write_codebook, write_shared_decoder
from bytecap.job import Job, Section
from bytecap.methods.baselines import kmeans
from bytecap.methods.baselines.sampled_curves import Choice, Family, Material, capacity, choose, sampled
from bytecap.types import Curve

STEPS = tuple(2 ** (i / 4) for i in range(-1, 13))  # scales, in standard deviations of a matrix
BASE = 1 << 24  # settings of a shared system: this plus the number of the step
PATCH, HIDDEN, BITS = 12, 16, 8
_TRAINING = 48  # vectors a codeword for k-means
_SAMPLE = 4096  # vectors of a matrix that estimates are made from
_DIMENSIONS = (2, 3, 4)
_MOST = 1024  # codewords; 4096 of three took 90 s more on the embedded model and won 0.3%
_HEADROOM = 1.5  # bits a weight that the finest step may take beyond the mean rate
_SPARE = 0.3  # that it must be able to take at least
_EPOCHS, _BATCH = 150, 2048  # steps of joint training, and of the decoder's alone
ENTRY = 7  # bytes of an object in the directory

S = TypeVar("S")
Seen = tuple[float, float]  # squared error of a matrix, bits of an index


@dataclass(frozen=True, eq=False)
class System:
    """Codewords (n, d) on the job's device, and the networks around them.

    Attributes:
        words: as they come back from a file, by rising length.
        byte: stored as signed bytes.
        encoder: from scaled patches (count, PATCH) to latents, None without decoder.
        decoder: None for plain codewords.
    """

    words: Tensor
    byte: bool
    encoder: Callable[[Tensor], Tensor] | None = None
    decoder: Decoder | None = None

    @property
    def width(self) -> int:
        """Number of weights of a patch."""
        return PATCH if self.decoder is not None else int(self.words.shape[1])

    def objects(self) -> tuple[bytes, ...]:
        """Return the shared objects: codewords, then the decoder."""
        book = write_codebook(self.words.cpu().numpy(), byte=self.byte)
        return (book, write_shared_decoder(self.decoder, BITS)) if self.decoder is not None else (book,)

    def bytes(self) -> int:
        """Return the bytes that the objects add to a file."""
        return sum(len(o) + ENTRY for o in self.objects())

    def code(self, weight: Tensor, scale: float) -> tuple[npt.NDArray[np.int64], Tensor]:
        """Code a matrix (rows, cols) at a scale; returns (indices in file order, decoded values)."""
        patches = kmeans.vectors_of(weight / scale, self.width)
        latents = patches if self.encoder is None else self.encoder(patches)
        index = kmeans.assign(latents.reshape(-1, self.words.shape[1]), self.words)
        values = self.words[index].reshape(len(patches), -1)
        if self.decoder is not None:
            values = torch.from_numpy(decode_patches(self.decoder, values.cpu().numpy())).to(weight.device)
        wide = (values * scale).reshape(len(weight), -1)
        return index.cpu().numpy(), wide[:, : weight.shape[1]]


def stored_scale(weight: Tensor, step: int) -> float:
    """Return the scale of a matrix at a step, as an f16 holds it."""
    spread = float(weight.square().mean().sqrt()) * STEPS[step]
    return float(np.float16(min(max(spread, 1e-7), 6e4)))


def estimate(weight: Tensor, system: System, step: int, seed: int) -> Seen:
    """Estimate (squared error, bits of an index) of a matrix at a step, from a sample of its rows."""
    generator = torch.Generator().manual_seed(seed)
    few = sampled(weight, generator, _SAMPLE * system.width)
    index, values = system.code(few, stored_scale(weight, step))
    error = float((values - few).square().mean()) * weight.numel()
    return error, entropy_of(index)


def entropy_of(index: npt.NDArray[np.int64]) -> float:
    """Estimate the entropy of an index in bits, with Miller's correction for unseen values."""
    counts = np.bincount(index)
    counts = counts[counts > 0]
    share = counts / counts.sum()
    return float(-(share @ np.log2(share)) + (len(counts) - 1) / (2 * math.log(2) * counts.sum()))


def _patches(materials: Sequence[Material], width: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw about `count` vectors of all matrices, in proportion to their sizes, each divided by its matrix's spread."""
    total, found = sum(m.weight.numel() for m in materials), []
    for m in materials:
        if m.weight.shape[1] >= width:
            rows = sampled(m.weight, generator, math.ceil(count * width * m.weight.numel() / total))
            found.append(kmeans.vectors_of(rows / stored_scale(m.weight, STEPS.index(1.0)), width))
    return torch.cat(found)


def rounded(words: FloatArray, *, byte: bool) -> FloatArray:
    """Round numbers as a file stores them."""
    return read_numbers(write_numbers(words, byte=byte), words.size, byte=byte).reshape(words.shape)


def _stored(words: Tensor, *, byte: bool) -> Tensor:
    return torch.from_numpy(rounded(words.cpu().numpy(), byte=byte)).to(words.device)


def _ordered(words: Tensor) -> Tensor:
    """Sort codewords by rising length, which at any scale is about falling use."""
    return words[words.square().sum(1).argsort()]


def book(materials: Sequence[Material], n: int, d: int, *, byte: bool, seed: int) -> System:
    """Return plain shared codewords."""
    generator = torch.Generator().manual_seed(seed)
    vectors = _patches(materials, d, _TRAINING * n, generator)
    return System(_stored(_ordered(kmeans.fit(vectors, n, generator, iterations=8)), byte=byte), byte)


class _Net(nn.Module):
    """A network of the identity plus one hidden layer of rectified units."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.skip = nn.Parameter(torch.eye(PATCH))
        self.inner = nn.Parameter(torch.randn(HIDDEN, PATCH, generator=generator) / PATCH**0.5)
        self.bias = nn.Parameter(torch.zeros(HIDDEN))
        self.outer = nn.Parameter(torch.zeros(PATCH, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.skip.T + torch.relu(x @ self.inner.T + self.bias) @ self.outer.T


def autoencoder(materials: Sequence[Material], n: int, d: int, *, byte: bool, seed: int) -> System:
    """Train encoder, codewords and decoder for patches of all matrices; `d` divides PATCH."""
    generator = torch.Generator().manual_seed(seed)
    device = materials[0].weight.device
    patches = _patches(materials, PATCH, _TRAINING * n * d // PATCH, generator)
    encoder, decoder = _Net(generator).to(device), _Net(generator).to(device)
    words = kmeans.fit(patches.reshape(-1, d), n, generator, iterations=6)

    def batch() -> Tensor:
        return patches[torch.randint(len(patches), (_BATCH,), generator=generator).to(device)]

    def quantized(z: Tensor) -> Tensor:
        flat = z.reshape(-1, d)
        return words[kmeans.assign(flat, words)].reshape(z.shape)

    def train(parameters: list[nn.Parameter], *, through: bool) -> None:
        optimizer = torch.optim.Adam(parameters, lr=2e-3)
        for _ in range(_EPOCHS):
            x = batch()
            z = encoder(x)
            optimizer.zero_grad()
            hard = quantized(z.detach())
            loss = (decoder(z + (hard - z).detach() if through else hard) - x).square().mean()
            loss.backward()
            optimizer.step()

    train([*encoder.parameters(), *decoder.parameters()], through=True)
    with torch.no_grad():
        latents = encoder(patches).reshape(-1, d)
        words = kmeans.fit(latents, n, generator, start=words, iterations=4)
        words = _stored(_ordered(words), byte=byte)
    train(list(decoder.parameters()), through=False)
    arrays = [t.detach().cpu().numpy() for t in (decoder.skip, decoder.inner, decoder.bias, decoder.outer)]

    def encode(x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = encoder(x)
        return found

    return System(words, byte, encode, Decoder(*arrays).stored(BITS))


def sizes(rate: float) -> list[tuple[int, int]]:
    """Return (codewords, dimension) pairs worth trying at a mean rate in bits a weight."""
    found = []
    for d in _DIMENSIONS:
        n = min(_MOST, 2 ** max(1, round((rate + _HEADROOM) * d)))
        if math.log2(n) / d > rate + _SPARE or d == _DIMENSIONS[0]:
            found.append((n, d))
    return found


def solve(
    plain: Sequence[Curve],
    systems: Sequence[System],
    curves: Callable[[System], list[Curve]],
    room: float,
) -> tuple[System | None, list[Curve], list[float]]:
    """Return the system whose plan is best after its fixed charge, or none, and the curves with its points.

    Predicted distortions at equal bytes come third, without any system first.

    Args:
        plain: curves without any shared system.
        systems: candidates.
        curves: those of the matrices coded by a system, without what they share.
        room: bytes for sections.
    """
    predicted = [_distortion(plain, room)]
    chosen: tuple[System | None, list[Curve]] = (None, list(plain))
    for system in systems:
        added = {c.name: c.points for c in curves(system)}
        both = [replace(c, points=(*c.points, *added.get(c.name, ()))) for c in plain]
        distortion = _distortion(both, room - system.bytes())
        if distortion < min(predicted):
            chosen = (system, both)
        predicted.append(distortion)
    return *chosen, predicted


@dataclass(frozen=True)
class FamilySettings:
    """The settings of a family of codings, and the system that its matrices share, if any."""

    options: dict[str, Any]
    seed: int
    name: str
    system: System | None = None

    @property
    def coded(self) -> bool:
        """Return whether the accounting is `coded`."""
        return bool(self.options["accounting"] == "coded")


class SharingFamily(Family[S], Protocol[S]):
    """A frozen dataclass that codes matrices alone or by what they share, which is its field `system`."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of the method."""
        ...

    def curve(self, material: Material, rate: float) -> Curve:
        """Estimate the points of a matrix near a mean rate in bits a weight, nothing shared."""
        ...

    def systems(self, materials: Sequence[Material], rate: float) -> list[System]:
        """Return candidates of what the matrices may share."""
        ...

    def common(self, materials: Sequence[Material], system: System) -> list[Curve]:
        """Return points of every matrix in a system's codewords, without the cost of shared objects."""
        ...

    def sharing(self, system: System) -> SharingFamily[S]:
        """Return the family whose matrices may use a system."""
        ...


def choose_shared(
    job: Job, family: SharingFamily[S], materials: Sequence[Material], stored: Mapping[str, Section]
) -> tuple[Choice[S], System | None]:
    """Choose settings under the cap, with the shared system that pays, if one does.

    Args:
        job: names the budget.
        family: codes matrices.
        materials: the matrices.
        stored: sections of everything else.

    Raises:
        BudgetError: the cheapest settings do not fit.
    """
    rate, curves = 8 * job.budget / max(1, sum(m.unit.parameters for m in materials)), list[Curve]()
    with job.reporter.step("curves", len(materials)) as advance:
        for m in materials:
            curves.append(family.curve(m, rate))
            advance(1)
    system = None
    if wanted(family.options):
        with job.reporter.step("shared codewords", 1):
            systems = family.systems(materials, rate)
            room = capacity(job, materials, stored)
            system, curves, predicted = solve(curves, systems, partial(family.common, materials), room)
            job.reporter.note(outcome(systems, predicted))
    if system is not None:
        family = family.sharing(system)
    objects = () if system is None else system.objects()
    return choose(charged(job, objects), materials, stored, curves, family), system


def outcome(systems: Sequence[System], predicted: Sequence[float]) -> str:
    """Describe in one line what each system would buy at equal bytes, its own included.

    >>> outcome([], [0.5])
    'nothing shared fits: predicted 0.5 nats per token without'
    """
    tried = ", ".join(
        f"{p:.4g} with {'a shared decoder' if s.decoder is not None else 'shared codewords'} of {s.bytes():,} bytes"
        for s, p in zip(systems, predicted[1:], strict=True)
    )
    start = f"at equal bytes: {tried}" if tried else "nothing shared fits"
    return f"{start}{';' if tried else ':'} predicted {predicted[0]:.4g} nats per token without"


def _distortion(curves: Sequence[Curve], room: float) -> float:
    try:
        return allocate(curves, room).distortion
    except BudgetError:
        return math.inf


def charged(job: Job, objects: tuple[bytes, ...]) -> Job:
    """Return the job whose files all hold these objects."""
    size: Callable[..., int] = job.size
    return replace(job, size=lambda sections, tables: size(sections, tables, objects))


def wanted(found: dict[str, Any]) -> bool:
    """Return whether a method's options leave room for a shared system; fixed codebooks do not."""
    return bool(found["shared"]) and not (found["n"] or found["g"])
