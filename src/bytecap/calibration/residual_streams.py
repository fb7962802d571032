"""Find the channels that matrices share: residual streams, and the inside of an MLP.

Channel j of one map's output and channel j of a later map's input are one channel where the first reaches the second
without mixing: through additions, norms and elementwise functions. Gradients tell: with the maps between them cut out,
most of the gradient of input channel j at the earlier output lies on channel j itself. Looked at for a few channels of
every map on one window; maps joined by such pairs, directly or over others, touch one stream. An embedding's output is
a row of its table, so it touches its stream with columns.

A matrix touches a stream as a reader, with its columns, as a writer, with its rows, or as both. Omitted: heads of
grouped attention (a value's channel serves several inputs of the output projection).

>>> module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3))
>>> for stream in find_streams(module, {n: n for n in ("0.weight", "2.weight", "4.weight")}, torch.ones(1, 5)):
...     print(stream.width, dict(stream.sides))
8 {'0.weight': 2, '2.weight': 1}
8 {'2.weight': 2, '4.weight': 1}
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.format.overlays.channels import COLUMNS, ROWS
from bytecap.model.batches import Batch
from bytecap.model.linears import linear_weights, maps_tokens
from bytecap.model.quantized_copy import copy_of
from bytecap.model.texts import Window
from bytecap.types import Unit

_PROBED = 5  # channels tried in every map
_DIRECT = 0.5  # share of a gradient on its own channel; mixing leaves about one in the width
_LEAST = 8  # channels below which shares say nothing
_BACK = 12  # earlier calls tried
_TOKENS = 64


@dataclass(frozen=True)
class ResidualStream:
    """Channels that several matrices share.

    Attributes:
        width: number of channels.
        sides: COLUMNS, ROWS or BOTH of `bytecap.format.overlays.channels` by unit name, readers and writers in model
            order.
    """

    width: int
    sides: Mapping[str, int]


@dataclass(frozen=True)
class _Call:
    """One call of a linear map or an embedding: its unit, and nodes and tensors at its ends."""

    reader: tuple[str, int] | None
    writer: tuple[str, int]
    input: Tensor
    output: Tensor


def streams_of(module: nn.Module, units: Sequence[Unit], windows: Sequence[Window]) -> tuple[ResidualStream, ...]:
    """Find the streams of a model on the beginning of its first window.

    Args:
        module: on the device it runs on.
        units: its units.
        windows: of any set.
    """
    names = {alias: u.name for u in units for alias in (u.name, *u.aliases)}
    first = windows[0]
    if not isinstance(first, Batch):
        device = next(module.parameters()).device
        return find_streams(module, names, torch.tensor([first.tokens[:_TOKENS]], device=device))
    return find_streams(module, names, first)


def find_streams(module: nn.Module, names: Mapping[str, str], batch: Any) -> tuple[ResidualStream, ...]:
    """Find the streams of a module, those of most matrices first.

    Args:
        module: any module; left as it is.
        names: unit name of every weight of a linear map or embedding, by its name in the state dictionary.
        batch: token numbers or another input of `module(batch)`, or a `bytecap.model.batches.Batch`.
    """
    module_copy = copy_of(module)
    calls = _calls(module_copy, names, batch)
    joined = _Joined()
    for number, call in enumerate(calls):
        if call.reader is None or not call.input.is_floating_point():
            continue
        for other in calls[max(0, number - _BACK) : number]:
            if other.reader is not None and other.input is call.input:
                joined.join(other.reader, call.reader, call.input.shape[-1])
                break  # what was found for the same input holds
        else:
            for writer in _direct(call, calls[max(0, number - _BACK) : number]):
                joined.join(writer, call.reader, call.input.shape[-1])
    return joined.streams()


def _calls(module_copy: nn.Module, names: Mapping[str, str], batch: Any) -> list[_Call]:
    """Record the calls of one forward pass, in order; the graph hangs on them."""
    found: list[_Call] = []

    def watch(m: nn.Module, name: str, kind: str) -> None:
        inputs: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            inputs.append(args[0])
            return (args[0].detach(), *args[1:])  # gradients go around maps, not through them

        def after(module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            given, table = inputs.pop(), kind == "embedding"
            if table or maps_tokens(module, given, output):
                found.append(
                    _Call(None if table else (name, COLUMNS), (name, COLUMNS if table else ROWS), given, output)
                )

        m.register_forward_pre_hook(before)
        m.register_forward_hook(after)

    for p in module_copy.parameters():
        p.requires_grad_(p.is_floating_point())
    for weight, (m, kind) in linear_weights(module_copy).items():
        if weight in names:
            watch(m, names[weight], kind)
    if isinstance(batch, Batch):
        batch.value(module_copy, next(module_copy.parameters()).device)
    else:
        module_copy(batch)
    return found


def _direct(call: _Call, earlier: Sequence[_Call]) -> list[tuple[str, int]]:
    """Return the writers whose channels reach a call's input unmixed."""
    width = call.input.shape[-1]
    some = [c for c in earlier if c.output.shape[-1] == width and c.output.requires_grad]
    if not some or width < _LEAST or not call.input.requires_grad:
        return []
    shares: list[list[float]] = [[] for _ in some]
    for j in torch.linspace(0, width - 1, _PROBED).long().tolist():
        gradients = torch.autograd.grad(
            call.input[..., j].sum(), [c.output for c in some], retain_graph=True, allow_unused=True
        )
        for share, g in zip(shares, gradients, strict=True):
            square = torch.zeros(width) if g is None else g.reshape(-1, width).double().square().sum(0)
            if bool(square.any()):
                share.append(float(square[j] / square.sum()))
    return [c.writer for c, share in zip(some, shares, strict=True) if share and statistics.median(share) > _DIRECT]


class _Joined:
    """Nodes (unit, side) that are the same channels."""

    def __init__(self) -> None:
        self._group: dict[tuple[str, int], dict[tuple[str, int], None]] = {}
        self._width: dict[tuple[str, int], int] = {}

    def join(self, a: tuple[str, int], b: tuple[str, int], width: int) -> None:
        """Join two nodes of one stream."""
        groups = [self._group.get(n, {n: None}) for n in (a, b)]
        merged = groups[0] | groups[1]
        for n in merged:
            self._group[n], self._width[n] = merged, width

    def streams(self) -> tuple[ResidualStream, ...]:
        """Return all streams; a matrix that is on one with both sides counts as BOTH."""
        found = []
        for group in {id(g): g for g in self._group.values()}.values():
            sides: dict[str, int] = {}
            for name, side in group:
                sides[name] = sides.get(name, side) | side
            if len(group) > 1:
                found.append(ResidualStream(self._width[next(iter(group))], sides))
        return tuple(sorted(found, key=lambda s: -len(s.sides)))
