"""Matrices into the layouts of a family of formats: measured curves, and rounding.

Matrices of one shape go together where a device takes many at a time; on the processor they go one by one. A matrix is
judged by an even sample of its rows, and by windows held out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bytecap.progress import Advance
from bytecap.runtimes.blocks import BlockFormat, Codes, FloatArray
from bytecap.runtimes.blocks.code_search import span
from bytecap.runtimes.blocks.encode import Factors, encode_all
from bytecap.runtimes.gguf.menu import Item, spread
from bytecap.types import Curve, Point

_A_COLUMN = 24  # bytes of device memory for each pair of columns of a matrix
_A_VALUE = 48  # and for each value
_TRIAL_BITS = 4.25  # a weight, near which orders are judged
_SHARE = 16  # part of the device's memory that is used: a fixed part, since sums depend on what goes together


@dataclass(frozen=True)
class Coding:
    """How a family of formats stores matrices.

    Attributes:
        names: of all settings; a point's setting is a place here.
        layout: block format of a setting for rows of so many columns, or None if it stores plain numbers.
        plain: values as plain numbers of a setting.
        rate: bytes of a matrix in a setting.
        sample: weights by which a matrix is judged.
    """

    names: Sequence[str]
    layout: Callable[[str, int], BlockFormat | None]
    plain: Callable[[str, FloatArray], FloatArray]
    rate: Callable[[Item, str], int]
    sample: int


@dataclass(frozen=True)
class Rounded:
    """A matrix in its setting.

    Attributes:
        codes: None where numbers are plain.
        values: float32 (rows, cols), decoded.
        seen: distortion in the metric it was rounded by, nats per token.
        held: in that of the windows held out.
        alone: both, if columns' errors had nothing to do with one another.
    """

    codes: Codes | None
    values: FloatArray
    seen: float
    held: float
    alone: tuple[float, float]


def choose_spans(coding: Coding, items: Sequence[Item]) -> list[Item]:
    """Items with their columns sorted where that loses less on held-out windows, by role and length of span.

    Sorted columns leave the light ones to make up for the heavy ones: where these differ by orders of magnitude, that
    drives light ones out of the range of codes.
    """
    roles: dict[str, list[Item]] = {}
    for item in items:
        roles.setdefault(item.role, []).append(item)
    chosen = {}
    for role, members in roles.items():
        tried: dict[int, BlockFormat] = {}
        for layout in (coding.layout(t, members[0].shape[1]) for t in members[0].types):
            if layout is not None and span(layout):
                known = tried.setdefault(span(layout), layout)
                tried[span(layout)] = min(known, layout, key=lambda x: abs(x.bits - _TRIAL_BITS))
        few = spread(members) if tried else []
        chosen[role] = tuple(n for n, layout in tried.items() if _lost(few, layout, n) < _lost(few, layout, 0))
    return [i.sorting(chosen[i.role]) for i in items]


def _lost(items: Sequence[Item], layout: BlockFormat, within: int) -> float:
    """Distortion on held-out windows of items in a layout."""
    coded = encode_all([i.weight for i in items], [i.factors(within=within) for i in items], layout)
    return sum(i.lost(values)[1] for i, (_, values) in zip(items, coded, strict=True))


def _span(coding: Coding, item: Item, name: str) -> int:
    """Length of the spans of a setting."""
    layout = coding.layout(name, item.shape[1])
    return 0 if layout is None else span(layout)


def curves(coding: Coding, items: Sequence[Item], advance: Advance) -> list[Curve]:
    """Measured points of matrices."""
    found: dict[str, Curve] = {}
    for group in together(items):
        samples = [i.sampled(coding.sample) for i in group]
        factors, points = _Factored(group), [list[Point]() for _ in group]
        for name in sorted(group[0].types, key=lambda n: _span(coding, group[0], n)):
            for at, (_, values) in enumerate(_coded(coding, [s for s, _ in samples], factors, name)):
                item, scale = samples[at]
                lost = scale * item.lost(values)[1]
                size = coding.rate(group[at], name)
                points[at].append(Point(size, lost if math.isfinite(lost) else 0.0, coding.names.index(name)))
        for item, measured in zip(group, points, strict=True):
            found[item.place.name] = Curve(item.place.name, tuple(sorted(measured, key=lambda p: p.rate)))
            advance(1)
    return [found[i.place.name] for i in items]


def round_all(
    coding: Coding, items: Sequence[Item], settings: Mapping[str, float], advance: Advance,
    keep: Callable[[Rounded], Rounded] = lambda rounded: rounded,
) -> dict[str, Rounded]:  # fmt: skip
    """Matrices in their settings, by name; `keep` is given each, and returns what is held of it."""
    found = {}
    chosen = {i.place.name: coding.names[int(settings[i.place.name])] for i in items}
    for group in together(items, lambda i: chosen[i.place.name]):
        name = chosen[group[0].place.name]
        coded = _coded(coding, group, _Factored(group), name, thorough=True)
        for item, (codes, values) in zip(group, coded, strict=True):
            found[item.place.name] = keep(_rounded(item, codes, values))
            advance(1)
    return found


def _rounded(item: Item, codes: Codes | None, values: Tensor) -> Rounded:
    return Rounded(codes, values.cpu().numpy(), *item.lost(values), item.alone(values))


class _Factored:
    """Factors of matrices of one shape, with columns sorted as the last setting wanted them."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items, self._span, self._found = items, -1, list[Factors]()

    def of(self, layout: BlockFormat) -> list[Factors]:
        """For a layout."""
        now = span(layout)
        if now != self._span:
            self._span = now
            self._found = [i.factors(within=now if now in i.spans else 0) for i in self._items]
        return self._found


def _coded(
    coding: Coding, items: Sequence[Item], factors: _Factored, name: str, *, thorough: bool = False
) -> Sequence[tuple[Codes | None, Tensor]]:
    """Matrices of one shape in a setting: codes, and decoded values on the items' device."""
    layout = coding.layout(name, items[0].shape[1])
    if layout is None:
        return [(None, torch.from_numpy(coding.plain(name, i.weight)).to(items[0].device)) for i in items]
    return encode_all([i.weight for i in items], factors.of(layout), layout, thorough=thorough)


def together(items: Sequence[Item], kind: Callable[[Item], str] = lambda _: "") -> Iterator[list[Item]]:
    """Items of one shape, menu and kind that a device takes at a time; on the processor each by itself."""
    groups: dict[tuple[object, ...], list[Item]] = {}
    for i in items:
        groups.setdefault((i.shape, i.types, kind(i), i.device), []).append(i)
    for members in groups.values():
        count = _at_a_time(members[0])
        for at in range(0, len(members), count):
            yield members[at : at + count]


def _at_a_time(item: Item) -> int:
    if torch.device(item.device).type != "cuda":
        return 1
    rows, cols = item.shape
    room = int(torch.cuda.get_device_properties(item.device).total_memory) // _SHARE
    return max(1, room // int(_A_COLUMN * cols * cols + _A_VALUE * rows * cols))
