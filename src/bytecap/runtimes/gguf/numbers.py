"""Hold the floating-point numbers of a file of blocks that recovery moves: scales, minimums, vectors, tables.

They are rounded to the type that the file has for them wherever they are used, with the gradient going straight
through. Integer codes and sub-scales stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytecap.job import Job
from bytecap.model.quantized_copy import as_stored
from bytecap.runtimes.blocks import Codes
from bytecap.runtimes.gguf.export import values_of
from bytecap.runtimes.gguf.menu import Item
from bytecap.runtimes.gguf.places import Layout, Place
from bytecap.runtimes.gguf.rounding import Rounded
from bytecap.runtimes.gguf.solve import Found
from bytecap.types import Unit

RATE = 1.5e-3  # first learning rate, relative to each number
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def _stored(now: Tensor, kind: torch.dtype) -> Tensor:
    """Numbers as the file holds them, with the gradient going straight through."""
    return now + (now.to(kind).float() - now).detach()


class _Scales:
    """A tensor in a block format as a function of its floating-point numbers."""

    def __init__(self, place: Place, codes: Codes, device: str) -> None:
        self.place, self.codes, form = place, codes, codes.format
        self.kind = _FLOATS[form.float_type]
        rows, per = len(codes.codes), form.block // form.sub
        blocks = codes.scale.shape[1]
        self.joined = form.minimums > 1 and not form.two_level  # the minimum is a multiple of the scale

        def there(array: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device)

        level = codes.codes.reshape(rows, blocks, per, -1) * codes.sub_scales.reshape(rows, blocks, per, 1).astype(
            np.int16
        )
        less = np.repeat(codes.sub_minimums.reshape(rows, blocks, per), form.sub, 2)
        self.level = there(level).reshape(rows, blocks, -1) * form.unit
        self.less = None
        if self.joined:
            self.level -= there(less)
        elif form.minimums:
            self.less = there(less)
        self.start = there(codes.scale), there(codes.minimum)
        count = 1 if self.less is None else 2
        self.leaves = [torch.zeros_like(s, requires_grad=True) for s in self.start[:count]]

    def numbers(self) -> list[Tensor]:
        """Scale and minimum as the file holds them, with gradient."""
        return [
            _stored(start * (1 + change), self.kind) for start, change in zip(self.start, self.leaves, strict=False)
        ]

    def values(self) -> Tensor:
        """(rows, cols) in the file's order, with gradient."""
        numbers = self.numbers()
        found = numbers[0][..., None] * self.level
        if self.less is not None:
            found = found - numbers[1][..., None] * self.less
        return found.reshape(len(self.level), -1)

    def written(self) -> Codes:
        """As the file would hold it now."""
        numbers = [n.detach().cpu().numpy().astype(self.codes.scale.dtype) for n in self.numbers()]
        scale = numbers[0]
        minimum = scale if self.joined else numbers[1] if len(numbers) > 1 else self.codes.minimum
        return replace(self.codes, scale=scale, minimum=minimum)


class Plain:
    """A vector or a table, which the file holds in a floating-point type."""

    def __init__(self, place: Place, values: Any, float_type: str, device: str) -> None:
        self.place, self.kind = place, _FLOATS[float_type]
        self.start = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device)
        self.size = max(float(self.start.abs().mean()), 1e-8)
        self.leaves = [torch.zeros_like(self.start, requires_grad=True)]

    def values(self) -> Tensor:
        """(rows, cols), one row for a vector, with gradient."""
        return _stored(self.start + self.size * self.leaves[0], self.kind)


@dataclass(frozen=True)
class Owner:
    """A unit, the values of it that are tuned, and its rows' places in that order."""

    unit: Unit
    parts: tuple[_Scales | Plain, ...]
    order: Tensor | None

    def values(self) -> Tensor:
        """In stored layout, with gradient."""
        found = torch.cat([p.values() - p.place.offset for p in self.parts])
        if self.order is not None:
            found = found[self.order]
        matrix = found.reshape(self.unit.matrix_shape)
        return as_stored(self.unit, matrix)


def owners_of(
    job: Job, layout: Layout, items: Sequence[Item], found: Found, vectors: str, tables: Collection[str]
) -> list[Owner]:
    """Return every unit all of whose stored values can be tuned; `vectors` and `tables` as `tune_blocks` has them."""
    names = {i.place.name for i in items}
    owners = (owner_of(job, unit, layout, names, found, vectors, tables) for unit in job.model.units)
    return [o for o in owners if o is not None]


def owner_of(
    job: Job, unit: Unit, layout: Layout, names: Collection[str], found: Found, vectors: str, tables: Collection[str]
) -> Owner | None:  # fmt: skip
    """Return a unit with its values that are tuned; None if some of them cannot be. `names`: tensors that compete."""
    parts: list[_Scales | Plain] = []
    places = layout.of(unit.name)
    for p in places:
        codes = found.rounded[p.name].codes if p.name in names else None
        if codes is not None and codes.format.float_type in _FLOATS:
            parts.append(_Scales(p, codes, job.device))
        elif p.name not in names and p.rows is None and (len(p.shape) == 1 or p.name in tables):
            parts.append(Plain(p, values_of(job.model, p), vectors, job.device))
    if not parts or len(parts) != len(places):
        return None
    rows = [np.arange(p.parameters // p.cols) if p.rows is None else p.rows for p in places]
    order = None
    if any(p.rows is not None for p in places):
        order = torch.from_numpy(np.argsort(np.concatenate(rows))).to(job.device)
    return Owner(unit, tuple(parts), order)


def written(items: Sequence[Item], found: Found, owners: Iterable[Owner], keep: Callable[[Rounded], Rounded]) -> Found:
    """The plan with numbers as they are now; `keep` is given every tensor, and returns what is held of it."""
    by_name = {i.place.name: i for i in items}
    rounded, vectors = dict(found.rounded), dict(found.vectors)
    for part in (p for o in owners for p in o.parts):
        name = part.place.name
        if isinstance(part, Plain):
            vectors[name] = part.values().detach().cpu().numpy().reshape(1, -1)
            continue
        codes, item = part.written(), by_name[name]
        values = codes.values()
        lost = item.lost(torch.from_numpy(values).to(item.device))
        rounded[name] = keep(Rounded(codes, values, *lost, rounded[name].alone))
    return replace(found, rounded=rounded, vectors=vectors)
