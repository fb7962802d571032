"""Compute the KL of a streamed coded model and its gradient, block by block, in memory that does not grow with depth.

Forward, both models side by side: what goes into every block of the coded one is kept in work files. Backward, from
the end: every block is loaded once more, run again with a graph of its own, and gone back through. It is the way of
`bytecap.calibration.streamed`, with the KL for a loss and other leaves than weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bytecap.calibration.kl_gradient import divergence
from bytecap.model.chain import first_of
from bytecap.model.forward import batches, predictions
from bytecap.model.head import head_pieces
from bytecap.model.predicted import run_on
from bytecap.model.streaming import Pass, Streamed
from bytecap.model.texts import Window
from bytecap.system.allocator import release
from bytecap.system.scratch import KeptTensor, Scratch

Weights = Callable[[int, nn.Module], Mapping[str, Tensor]]
"""Gives parameters of a block that is loaded, with a graph to the leaves, by their names in the block."""
_Frame = tuple[KeptTensor, tuple[Any, ...], dict[str, Any]]


def kl_backward(
    original: Streamed,
    quantized_copy: Streamed,
    windows: Sequence[Window],
    weights: Weights,
    *,
    batch: int,
    scratch: Scratch,
) -> float:
    """Add to the leaves behind `weights` the gradient of the mean KL to the original, which is returned.

    Args:
        original: untouched model.
        quantized_copy: coded model.
        windows: plain windows.
        weights: what stands in for parameters of blocks.
        batch: tokens of one pass.
        scratch: for what goes into blocks.
    """
    data = list(batches(windows, batch))
    tokens = sum(int(mask.sum()) for _, mask in data)
    lanes = (original, quantized_copy)
    waiting = [[Pass(lane, partial(run_on, ids, lane.device)) for ids, _ in data] for lane in lanes]
    try:
        frames, ends = _forward(lanes, waiting, weights, scratch)
        kl, gradients = 0.0, []
        cache: dict[Any, Tensor] = {}
        with original.outside(cache), quantized_copy.outside(cache):
            for passes, (_, mask), end in zip(zip(*waiting, strict=True), data, ends, strict=True):
                found, gradient = _loss(lanes, passes, mask.to(original.device), end, tokens)
                kl += found
                gradients.append(gradient)
        del cache, ends
    finally:
        for p in (p for group in waiting for p in group):
            p.cancel()
    for number in reversed(range(quantized_copy.chain.count)):
        _backward(number, quantized_copy, frames.pop(), gradients, weights)
        release()
    return kl


@torch.no_grad()
def _forward(
    lanes: tuple[Streamed, Streamed], waiting: Sequence[Sequence[Pass]], weights: Weights, scratch: Scratch
) -> tuple[list[list[_Frame]], list[Tensor]]:
    """Go behind the last block; returns what went into every block of the second model, and its outputs."""
    chain, frames, stops = lanes[1].chain, list[list[_Frame]](), list[Any]()
    cache: dict[Any, Tensor] = {}
    for lane, group in zip(lanes, waiting, strict=True):
        with lane.outside(cache):
            stops = [p.advance() for p in group]
    del cache
    for number in range(chain.count):
        with lanes[0].block(number):
            for p in waiting[0]:
                p.advance()
        frames.append([(scratch.put(chain.taken(a, k)), *chain.given(a, k, None)) for a, k in stops])
        with lanes[1].block(number) as block:
            parameters = dict(block.named_parameters())
            for name, value in weights(number, block).items():
                parameters[name].data = value.detach()
            stops = [p.advance() for p in waiting[1]]
        release()
    return frames, stops


def _loss(
    lanes: tuple[Streamed, Streamed], passes: Sequence[Pass], mask: Tensor, end: Tensor, tokens: int
) -> tuple[float, Tensor]:
    """Return a batch's share of the KL, and its gradient at the last block's output."""
    leaf, count, total = end.detach().requires_grad_(), int(mask.sum()), 0.0
    with head_pieces(lanes[0], count) as whole, head_pieces(lanes[1], count) as pieces:
        with torch.no_grad():
            aims = predictions(passes[0].advance(), mask)
        with torch.enable_grad():
            found = predictions(passes[1].advance(leaf), mask)
            inner = found.detach().requires_grad_()
            for one, other in zip(aims.split(pieces.rows), inner.split(pieces.rows), strict=True):
                with torch.no_grad():
                    aim = whole.logits(one)
                own = pieces.logits(other)
                loss, slopes = divergence(own.detach(), aim)
                torch.autograd.backward(own, slopes.div_(tokens))
                total += float(loss) / tokens
            found.backward(inner.grad)
    assert leaf.grad is not None  # noqa: S101 (logits are made of it)
    return total, leaf.grad


def _backward(
    number: int, streamed: Streamed, frames: Sequence[_Frame], gradients: list[Tensor], weights: Weights
) -> None:  # fmt: skip
    """Go through one block again, and back; gradients become those of its input."""
    with streamed.block(number) as block, torch.enable_grad():
        for i, (kept, args, kwargs) in enumerate(frames):
            leaf = kept.load(streamed.device).detach().requires_grad_()
            given, named = streamed.chain.given(args, kwargs, leaf)
            found = first_of(functional_call(block, dict(weights(number, block)), given, named))
            torch.autograd.backward(found, gradients[i])
            gradients[i] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
