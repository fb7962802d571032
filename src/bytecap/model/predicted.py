"""Give what a model and variants of it predict, batch by batch, whether their values are in memory or streamed.

A model in memory runs when its logits are asked for, one variant after the other. Streamed models run side by side,
block by block, so that every block is read once for all batches; of their logits only a piece exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.model import streaming
from bytecap.model.forward import predictions
from bytecap.model.head import Pieces, head_pieces
from bytecap.model.quantized_copy import Values, swapped
from bytecap.model.streaming import Streamed
from bytecap.sizes import in_groups
from bytecap.system.allocator import no_holes

WAITING = {"cpu": 2**15, "cuda": 2**18}  # tokens, of all models together, that wait in front of a streamed block
Logits = Callable[[], Tensor]  # (n, vocabulary), of the next n predictions in the batch's mask
Batches = Sequence[tuple[Tensor, Tensor]]  # ids (batch, length + 1) and mask (batch, length)


def device_of(module: nn.Module) -> torch.device:
    """The device that a module's passes run on."""
    streamed = streaming.of(module)
    return next(module.parameters()).device if streamed is None else streamed.device


def predicted(
    original: nn.Module, quantized_copy: nn.Module, variants: Mapping[str, Values], data: Batches, device: str
) -> Iterator[Iterator[list[Logits]]]:
    """Yield, for every batch, pieces of its predictions: the logits of the original and of every variant.

    Args:
        original: untouched model.
        quantized_copy: what variants are made of; a streamed one if the original is streamed. The original itself where
            there are none.
        variants: values that are put into the copy.
        data: batches.
        device: torch device.
    """
    streamed = streaming.of(original)
    if streamed is not None:
        source = streaming.of(quantized_copy)
        assert source is not None  # noqa: S101 (a copy of a streamed model is streamed)
        lanes = [streamed, *map(source.variant, variants.values())]
        most = WAITING[streamed.device.type] // len(lanes)
        for some in in_groups(data, lambda batch: batch[1].numel(), most):
            yield from _side_by_side([streamed] if source is streamed else [streamed, source], lanes, some)
        return
    for ids, mask in data:
        inputs, flat = ids[:, :-1].to(device), mask.to(device)
        yield iter([[
            partial(_of, original, inputs, flat),
            *(partial(_swapped, quantized_copy, values, inputs, flat) for values in variants.values()),
        ]])  # fmt: skip


def _of(module: nn.Module, inputs: Tensor, mask: Tensor) -> Tensor:
    return predictions(module(inputs), mask)


def _swapped(module: nn.Module, values: Values, inputs: Tensor, mask: Tensor) -> Tensor:
    with swapped(module, values):
        return _of(module, inputs, mask)


def run_on(ids: Tensor, device: torch.device, module: nn.Module) -> Any:
    """Run one pass over a batch's tokens, without the last of each window, which predicts nothing."""
    return module(ids[:, :-1].to(device))


def _side_by_side(
    models: Sequence[Streamed], lanes: Sequence[Streamed], data: Batches
) -> Iterator[Iterator[list[Logits]]]:
    """Yield the pieces of streamed models; all lanes but the first are variants of the second model."""
    device = lanes[0].device
    most = max((int(mask.sum()) for _, mask in data), default=0)
    cache: dict[Any, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(no_holes())
        first, *rest = (stack.enter_context(head_pieces(x, most)) for x in models)
        pieces = [first, *rest * (len(lanes) - 1)]
        found = streaming.sweep(lanes, [partial(run_on, ids, device) for ids, _ in data], cache)
        for ends, (_, mask) in zip(found, data, strict=True):
            flat = mask.to(device)
            if pieces[0].head is None:  # one model's logits after the other
                yield iter([[partial(_last, end, flat) for end in ends]])
            else:
                yield _pieces([_last(end, flat) for end in ends], pieces, lanes, cache)


def _last(end: Callable[[], Any], mask: Tensor) -> Tensor:
    return predictions(end(), mask)


def _pieces(
    hidden: Sequence[Tensor], pieces: Sequence[Pieces], lanes: Sequence[Streamed], cache: dict[Any, Tensor]
) -> Iterator[list[Logits]]:
    rows = max(1, pieces[0].rows)
    for at in range(0, len(hidden[0]), rows):
        yield [
            partial(_headed, p, h[at : at + rows], lane, cache)
            for h, p, lane in zip(hidden, pieces, lanes, strict=True)
        ]


def _headed(pieces: Pieces, hidden: Tensor, lane: Streamed, cache: dict[Any, Tensor]) -> Tensor:
    with lane.outside(cache):
        return pieces.logits(hidden)
