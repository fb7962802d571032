"""Estimate the coded bytes of a module's matrices differentiably, for a loss such as `loss + mu * rate(module)`.

Everything the coder (`bytecap.format.coders.trellis`) knows when it codes a weight is used as it uses it: steps by row
and column, spread classes of rows and columns in quarter octaves, a table for each class, fitted to the symbols that
occur; columns of some spread on a grid of half the step, of which a path takes every other point for one bit a weight.
The value is the code length of the weights as they would be rounded, side information included, in bytes. So `mu` is in
nats per byte: the slope at which the finished model's plan will buy bytes.

The gradient is that of the code length averaged over a uniform shift of one step, tables and classes held: between two
symbols a weight moves along the line through their code lengths. Tables are fitted to the weights at every call, so
that to first order their own change has no effect on the total.

Omitted: error feedback and input moments, which a training loop does not have (the coder's column steps come from a
Cholesky factor, here from gradient energies where they are given); tables shared by several classes; vectors.

>>> module = nn.Linear(64, 64)
>>> bytes_ = rate(module, bits=3.0)
>>> bytes_.backward()
>>> round(bytes_.item() * 8 / 64**2), bool((module.weight.grad * module.weight).sum() > 0)
(3, True)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bytecap.errors import UsageError
from bytecap.format.coders.classes import CLASSES, OCTAVE, UNIT_CLASS
from bytecap.quantization.quantizer import FIRST_DEPENDENT
from bytecap_lab.train.pquant import PQuantLinear

Energies = Mapping[str, Tensor]

SYMBOLS = 1024  # sizes a table tells apart
_ESCAPE = 16.0  # bits of a larger one
_HEADER = 25 + 10  # bytes of a section's head and of its place in the file
_PRIOR = 4.0  # symbols' worth of a Gaussian in every class, as the coder's tables have
_LEAST = 2.0**-14  # of a table's frequencies
_ROUNDS = 4  # of the search for a step
_UNSEEN = 1e-4  # least energy of a row or column, in means


@dataclass(frozen=True)
class _Coded:
    """A batch of equally shaped matrices as coded at a step.

    Attributes:
        size: |weight| in steps of its grid, (batch, rows, cols).
        low, high: the two symbols it may become, equally likely.
        cls: class of the grid it lies on, (batch, rows, cols).
        fine: (batch, 1, cols), columns along a path.
        side: bits of side information.
    """

    size: Tensor
    low: Tensor
    high: Tensor
    cls: Tensor
    fine: Tensor
    side: float


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Live matrices by name, those of `PQuantLinear` left out: their rate is fixed. Shared ones count once."""
    fixed = {id(m.weight) for m in module.modules() if isinstance(m, PQuantLinear)}
    return {
        n: p
        for n, p in module.named_parameters()
        if p.ndim >= 2 and p.is_floating_point() and min(p.shape[0], p[0].numel()) > 1 and id(p) not in fixed
    }


def _normalized(weights: Mapping[str, Tensor], known: Energies | None) -> list[Tensor]:
    """Return weights (batch, rows, cols) by shape, divided by the factors that their steps are proportional to."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, p in weights.items():
        groups.setdefault((p.shape[0], p[0].numel()), []).append(name)
    found = []
    for (rows, cols), names in groups.items():
        stack = torch.stack([weights[n].float().reshape(rows, cols) for n in names])
        if known is not None:
            energy = torch.stack([known[n].to(stack).reshape(rows, cols) for n in names])
            stack = stack * _inverse_steps(energy)
        found.append(stack)
    return found


def _inverse_steps(energy: Tensor) -> Tensor:
    """Square roots of the separable part of energies (batch, rows, cols), in the coder's quarter octaves."""
    mean = energy.mean((1, 2), keepdim=True).clamp(min=1e-30)
    parts = [(energy.mean(d, keepdim=True) / mean).clamp(min=_UNSEEN) for d in (2, 1)]
    root = [torch.exp2(torch.round(2 * torch.log2(p)) / 4) for p in parts]
    return mean.sqrt() * root[0] * root[1]


@torch.no_grad()
def _code(weight: Tensor, step: float) -> _Coded:
    u = weight.abs() / step
    row = 2 * torch.log2(u.square().mean(2) + 1 / 12)
    row = torch.round(row - row.mean(1, keepdim=True)).clamp(-40, 40)[:, :, None]
    column = (u * torch.exp2(-row / 4)).square().mean(1, keepdim=True)
    column = torch.round(2 * torch.log2(column.clamp(min=1e-12)) + UNIT_CLASS).clamp(1, CLASSES - 1)
    fine = column >= FIRST_DEPENDENT
    more = OCTAVE * fine
    cls = torch.minimum(torch.maximum(row + column + more, 1 + more), torch.full_like(more, CLASSES - 1)).int()
    u *= 1.0 + fine
    low = torch.where(fine, u.floor(), (u + 0.5).floor()).clamp_(max=SYMBOLS - 3).int()
    side = _entropy(row) + _entropy(column) + 8.0 * _HEADER * len(weight)
    return _Coded(u, low, low + fine.int(), cls, fine, side)


def _entropy(values: Tensor) -> float:
    """Bits of small integers under their own histogram."""
    _, count = torch.unique(values, return_counts=True)
    share = count / count.sum()
    return float(-(count * share.log2()).sum())


def _lengths(parts: list[_Coded]) -> tuple[Tensor, Tensor]:
    """Bits of a symbol by class and size (CLASSES, SYMBOLS): on a plain grid, and on a path."""
    device = parts[0].cls.device
    count = torch.zeros(CLASSES * SYMBOLS, dtype=torch.int64, device=device)
    for p in parts:
        for symbol in (p.low, p.high):
            count += torch.bincount((p.cls * SYMBOLS + symbol).reshape(-1), minlength=CLASSES * SYMBOLS)
    spread = torch.exp2((torch.arange(CLASSES, device=device) - UNIT_CLASS) / 4).clamp(min=0.3)
    z = torch.arange(SYMBOLS, device=device)
    prior = torch.exp(-0.5 * (z / spread[:, None]) ** 2) + 1e-6
    mass = count.reshape(CLASSES, SYMBOLS) / 2 + _PRIOR * prior / prior.sum(1, keepdim=True)
    mass /= mass.sum(1, keepdim=True)
    signed = torch.where(z > 0, mass / 2, mass).clamp(min=_LEAST)
    odd = mass[:, 1::2].sum(1) / 2
    subset = torch.stack([mass[:, 0::4].sum(1), odd, mass[:, 2::4].sum(1), odd], 1)
    return -signed.log2(), 1 + (subset[:, z % 4] / signed).log2().clamp(min=0)


def _total(weight: list[Tensor], step: float) -> tuple[Tensor, list[Tensor]]:
    """(bits, gradient of the averaged bits for every group's weights)."""
    with torch.no_grad():
        parts = [_code(w, step) for w in weight]
        plain, path = _lengths(parts)
        slopes = [torch.zeros_like(t) for t in (plain, path)]
        slopes[0][:, :-1] = plain.diff(dim=1)
        slopes[1][:, :-2] = path[:, 2:] - path[:, :-2]  # a line between the middles of two cells, two to a step
        length, slope = torch.stack([plain, path]).reshape(-1), torch.stack(slopes).reshape(-1)
        bits = torch.zeros((), device=length.device)
        gradients = []
        for w, p in zip(weight, parts, strict=True):
            at = (p.cls + CLASSES * p.fine.int()) * SYMBOLS
            bits = bits + (length[at + p.low] + length[at + p.high]).sum(dtype=torch.float64) / 2 + p.side
            bits = bits + _ESCAPE * (p.low == SYMBOLS - 3).sum()
            between = (p.size - 0.5 * p.fine).floor()
            inside = between.clamp(0, SYMBOLS - 3).int()
            gradients.append(torch.where(between < 0, 0.0, slope[at + inside]) * w.sign() / step)
    return bits, gradients


def _search(weight: list[Tensor], bits: float) -> float:
    """The step at which weights take so many bits each."""
    count = sum(w.numel() for w in weight)
    spread = math.sqrt(sum(float(w.detach().square().sum()) for w in weight) / count)
    step: float = 2.0 ** (2.05 - bits) * spread + 1e-12
    for _ in range(_ROUNDS):
        found = float(_total([w.detach() for w in weight], step)[0]) / count
        if abs(found - bits) < 2e-3 * bits:
            break
        # at low rates bits fall by less than one for every doubling
        step *= 2.0 ** max(-3.0, min(3.0, (found - bits) / min(1.0, 0.3 + 0.35 * bits)))
    return step


def _checked(module: nn.Module, known: Energies | None) -> list[Tensor]:
    weights = matrices(module)
    if not weights:
        raise UsageError(f"{type(module).__name__} holds no matrix whose rate could be estimated")
    missing = [n for n in weights if known is not None and n not in known]
    if missing:
        raise UsageError(f"there are no energies of {missing[0]}")
    return _normalized(weights, known)


def step_for(module: nn.Module, bits: float, *, energies: Energies | None = None) -> float:
    """The step at which a module's matrices take `bits` bits a weight; see `rate`."""
    return _search(_checked(module, energies), bits)


def rate(
    module: nn.Module,
    *,
    bits: float = 3.0,
    slope: float | None = None,
    step: float | None = None,
    energies: Energies | None = None,
) -> Tensor:
    """Bytes that a module's matrices would take, a scalar with gradients.

    Args:
        module: any module; a tensor with several names counts once.
        bits: bits a weight for which the step is chosen, at every call. The value is then about constant; its gradient
            says which weights cost more than others at that rate.
        slope: nats per byte, instead: every weight gets the step whose last byte buys as much. Needs `energies`.
        step: the step itself, instead, as of `step_for`: spares a search at every call. With energies it is that of a
            weight of energy 1.
        energies: mean squared gradients per token, in the parameters' shapes, by name (see `energies`); steps are then
            in proportion to their separable part to the power of -1/2. Without them all weights have one step.

    Raises:
        UsageError: no matrix, an energy is missing, or a slope without energies.
    """
    weight = _checked(module, energies)
    if slope is not None:
        if energies is None or slope <= 0:
            raise UsageError("a slope needs energies and must be positive: rate(module, slope=1e-7, energies=...)")
        # distortion of a weight: energy * step^2 / 24 nats, divided by four for every bit more
        step = math.sqrt(12 * slope / (8 * math.log(2)))
    elif step is None:
        step = _search(weight, bits)
    total, gradients = _total([w.detach() for w in weight], step)
    through = torch.stack([(w * g).sum() for w, g in zip(weight, gradients, strict=True)]).sum()
    return (total.float() + (through - through.detach())) / 8


def energies(optimizer: torch.optim.Optimizer, module: nn.Module, tokens: int) -> dict[str, Tensor]:
    """Mean squared gradients per token of a module's matrices, from the second moments an Adam optimizer keeps.

    Args:
        optimizer: Adam or AdamW, after at least one step.
        module: whose parameters it moves.
        tokens: predictions in a step: the gradient of their mean has that many times less variance than one's.

    Raises:
        UsageError: the optimizer keeps none of a matrix.
    """
    found = {}
    betas = {id(p): group["betas"][1] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
    for name, p in matrices(module).items():
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state or id(p) not in betas:
            raise UsageError(f"the optimizer keeps no mean squared gradient of {name}: use Adam, after a step")
        found[name] = state["exp_avg_sq"].detach() * (tokens / (1 - betas[id(p)] ** float(state["step"])))
    return found
