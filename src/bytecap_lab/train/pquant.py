"""`PQuantLinear` is a linear layer of 1-bit weights and a few vectors of 8-bit weights, trained from scratch.

The weight is one matrix (out, in). `wide` of its columns (or rows) are the 8-bit branch, all others the 1-bit branch::

    w1 = beta  * sign(W - mean(W)) * mean|W row|      of the 1-bit part
    w8 = alpha * round(W / d) * d,  d = max|W vector| / 127

With columns, `y = alpha y8 + beta y1` is the sum of two branches that read different inputs; with rows, both branches
read everything and write different outputs, nothing is added up and there are no alpha and beta. The paper's
feed-forward layer with `r` hidden units of 8 bits beside the 1-bit ones is `wide=r, axis="out"` for what writes the
hidden units and `wide=r, axis="in"` for what reads them; its attention is `wide=0`.

Both products `beta * mean|W row|` and `alpha * d` are rounded to float16 in the forward pass already, because that is
how they are stored: a file holds exactly the weights that were trained (`bytecap_lab.train.export`). Gradients go
straight
through every rounding: what reaches `w1` reaches `W` times beta, as if nothing had been rounded.

Source: pQuant (arXiv:2602.22592); straight-through and activations after BitNet (arXiv:2310.11453). Chosen here: a mean
size for each row, not for the matrix, since the format stores one for each row anyway; one scale for each 8-bit vector.
Omitted: the paper's mixture of several 8-bit branches.

>>> layer = PQuantLinear(8, 4, wide=2)
>>> layer.quantized().shape, len(set(layer.quantized()[0, 2:].abs().tolist()))
(torch.Size([4, 8]), 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bytecap.errors import UsageError

Axis = Literal["in", "out"]
ALPHA, BETA = 2.0, 0.2  # as published
_LEVELS = 127
_MOST = 65504.0  # of float16


@dataclass(frozen=True)
class Branches:
    """Both branches of a layer as they are stored.

    Attributes:
        signs: (out, in), -1 or 1; of no meaning under the 8-bit branch.
        sizes: float16 (out,), of the 1-bit branch's rows.
        codes: (wide, length) from -127 to 127, vector after vector.
        scales: float16 (wide,).
    """

    signs: Tensor
    sizes: Tensor
    codes: Tensor
    scales: Tensor


def _half(x: Tensor) -> Tensor:
    return x.clamp(-_MOST, _MOST).half()


def _split(weight: Tensor, wide: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """(8-bit part with its vectors as rows, 1-bit part) of a matrix (out, in), as views."""
    return (weight[:, :wide].T, weight[:, wide:]) if axis == "in" else (weight[:wide], weight[wide:])


class _Quantize(torch.autograd.Function):
    """Latent weight to the stored one; straight through backwards."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor, beta: Tensor, wide: int, axis: Axis) -> Tensor:
        found = branches(weight, alpha, beta, wide, axis)
        value = combined(found, wide, axis)
        ctx.how = wide, axis
        ctx.save_for_backward(value, alpha, beta)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (value, alpha, beta) = gradients, ctx.saved_tensors
        inner, rest = _split(value, *ctx.how)
        g8, g1 = _split(g, *ctx.how)
        to = torch.empty_like(g)
        to8, to1 = _split(to, *ctx.how)
        torch.mul(g8, alpha, out=to8)
        torch.mul(g1, beta, out=to1)
        scales = [(a * b).sum() / torch.where(s == 0, 1.0, s) for a, b, s in ((g8, inner, alpha), (g1, rest, beta))]
        return to, *scales, None, None


@torch.no_grad()
def branches(weight: Tensor, alpha: Tensor, beta: Tensor, wide: int, axis: Axis) -> Branches:
    """Return the branches that a latent weight (out, in) is stored as."""
    weight = weight.float()
    inner, rest = _split(weight, wide, axis)
    mean = rest.mean() if rest.numel() else torch.zeros((), device=weight.device)
    sizes = torch.zeros(len(weight), device=weight.device)
    if rest.numel():
        sizes[len(weight) - len(rest) :] = beta * rest.abs().mean(1)
    signs = torch.where(weight >= mean, 1.0, -1.0)
    peak = inner.abs().amax(1) / _LEVELS if inner.numel() else inner.new_zeros(0)
    codes = torch.round(inner / peak.clamp(min=torch.finfo(torch.float32).tiny)[:, None]) if inner.numel() else inner
    return Branches(signs, _half(sizes), codes, _half(alpha * peak))


def combined(found: Branches, wide: int, axis: Axis) -> Tensor:
    """The matrix (out, in) of both branches, in the arithmetic of the format's `binary`, `columns` and `rows`."""
    value = found.signs * found.sizes.float()[:, None]
    inner, _ = _split(value, wide, axis)
    inner.copy_(found.codes * found.scales.float()[:, None])
    return value


class PQuantLinear(nn.Linear):
    """A linear layer whose forward weights are those of a 1-bit and an 8-bit branch.

    Args:
        in_features, out_features: as of `nn.Linear`.
        bias: as of `nn.Linear`; stored apart, not quantized here.
        wide: vectors in the 8-bit branch, the first ones; 0 is 1-bit alone, all of them 8-bit alone.
        axis: they are columns (`in`) or rows (`out`).
        activations: bits of the inputs, one scale for each token, as in the paper (8); None leaves them alone.
        device, dtype: as of `nn.Linear`.

    Attributes:
        weight: latent weights (out, in), updated by the optimizer.
        alpha, beta: learnable scales of the branches; constants where nothing is added up.

    Raises:
        UsageError: `wide` or `activations` out of range.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        wide: int = 0,
        axis: Axis = "in",
        activations: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        most = in_features if axis == "in" else out_features
        if axis not in {"in", "out"} or not 0 <= wide <= most:
            raise UsageError(f"an 8-bit branch of {wide} vectors along {axis!r} does not fit {out_features} x "
                             f"{in_features} weights: 0 to {most}, along 'in' or 'out'")  # fmt: skip
        if activations is not None and not 2 <= activations <= 16:
            raise UsageError(f"activations of {activations} bits: use 2 to 16, or None")
        self.wide, self.axis, self.activations = wide, axis, activations
        start = (ALPHA, BETA) if axis == "in" and 0 < wide < most else (1.0, 1.0)
        for name, value in zip(("alpha", "beta"), start, strict=True):
            scalar = torch.tensor(value, device=device)
            if start == (1.0, 1.0):
                self.register_buffer(name, scalar, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(scalar))

    def branches(self) -> Branches:
        """Return the branches that the layer is stored as."""
        return branches(self.weight, self.alpha, self.beta, self.wide, self.axis)

    def quantized(self) -> Tensor:
        """The forward weights (out, in), float32, with gradients for the latent ones."""
        value: Tensor = _Quantize.apply(self.weight, self.alpha, self.beta, self.wide, self.axis)  # type: ignore[no-untyped-call]
        return value

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name it has in nn.Linear)
        """As `nn.Linear`, with the quantized weights."""
        x = input if self.activations is None else rounded_inputs(input, self.activations)
        return functional.linear(x, self.quantized().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Describe the layer for printing."""
        return f"{super().extra_repr()}, wide={self.wide}, axis={self.axis}, activations={self.activations}"


def rounded_inputs(x: Tensor, bits: int) -> Tensor:
    """Inputs (..., features) as signed integers of `bits` bits times one scale for each token; straight through.

    >>> rounded_inputs(torch.tensor([[0.5, -1.0, 0.26]]), 2)
    tensor([[ 1., -1.,  0.]])
    """
    levels = (1 << (bits - 1)) - 1
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / levels
        # to nearest, halves up: the same on every device
        change = torch.floor(x / scale + 0.5).clamp(-levels, levels) * scale - x
    return x + change


def schedule(
    step: int, steps: int, *, peak: float = 1.5e-3, decay: float = 0.1, warm_up: int = 0
) -> tuple[float, float]:
    """(learning rate, weight decay) of step `step` of `steps`: two phases of equal length.

    In the first one the rate falls linearly from `peak` towards half of it, under weight decay; the second begins at a
    third of `peak` and ends at 0 without weight decay, so that signs settle.

    Source: pQuant trains in two phases; the numbers are those of BitNet b1.58 2B4T (arXiv:2504.12285: 1.5e-3 to 8e-4,
    then 5e-4 to 0; weight decay 0.1, then 0), which the paper's schedule follows.

    >>> [tuple(round(x, 6) for x in schedule(s, 100, peak=3e-3)) for s in (0, 49, 50, 99)]
    [(0.003, 0.1), (0.001628, 0.1), (0.001, 0.0), (2e-05, 0.0)]
    """
    if not 0 <= step < steps:
        raise UsageError(f"step {step} of {steps}: steps count from 0")
    begin = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
    half = math.ceil(steps / 2)
    if step < half:
        return begin * peak * (1 - (1 - 8 / 15) * step / half), decay
    return begin * peak / 3 * (1 - (step - half) / max(1, steps - half)), 0.0
