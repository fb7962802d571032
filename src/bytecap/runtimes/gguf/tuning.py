"""Tune the continuous numbers of a file of blocks at frozen codes, and so at the same bytes.

Scales and minimums of blocks, vectors, and tables that a directory keeps in 16 bits follow Adam on the KL to the
original; they are rounded to the type that the file has for them in every pass, with the gradient going straight
through. From time to time the result is measured on
the correction tokens, and the best of these is written. Integer sub-scales stay as they are: they are shared with
codes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytecap.job import Job
from bytecap.model.quantized_copy import copy_of, load_values
from bytecap.recovery.kl_passes import Passes, same_again
from bytecap.recovery.tuning import Clock
from bytecap.runtimes.blocks import Codes
from bytecap.runtimes.gguf.export import values_of
from bytecap.runtimes.gguf.menu import Item
from bytecap.runtimes.gguf.places import Layout, Place
from bytecap.runtimes.gguf.rounding import Rounded
from bytecap.runtimes.gguf.solve import Found, unit_values
from bytecap.types import Unit

RATE = 1.5e-3  # first learning rate, relative to each number
_WARMING = 10  # iterations until the full rate
_CHECKS, _APART = 8, 5  # validations on the correction tokens, and iterations between two of them at least
_LOST = 4.0  # times the first KL, beyond which tuning is stopped
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


class _Plain:
    """A vector or a table, which the file holds in a floating-point type."""

    def __init__(self, place: Place, values: Any, float_type: str, device: str) -> None:
        self.place, self.kind = place, _FLOATS[float_type]
        self.start = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device)
        self.size = max(float(self.start.abs().mean()), 1e-8)
        self.leaves = [torch.zeros_like(self.start, requires_grad=True)]

    def values(self) -> Tensor:
        """In the shape of the original, with gradient."""
        return _stored(self.start + self.size * self.leaves[0], self.kind)


@dataclass(frozen=True)
class _Owner:
    """A unit, the values of it that are tuned, and its rows' places in that order."""

    unit: Unit
    parts: tuple[_Scales | _Plain, ...]
    order: Tensor | None

    def values(self) -> Tensor:
        """In stored layout, with gradient."""
        found = torch.cat([p.values() - p.place.offset for p in self.parts])
        if self.order is not None:
            found = found[self.order]
        matrix = found.reshape(self.unit.matrix_shape)
        return (matrix.T if self.unit.transposed else matrix).reshape(self.unit.shape)


def owners_of(
    job: Job, layout: Layout, items: Sequence[Item], found: Found, vectors: str, tables: Collection[str] = ()
) -> list[_Owner]:
    """Every unit all of whose stored values can be tuned; `vectors` and `tables` as `tune_blocks` has them."""
    by_name = {i.place.name: i for i in items}
    owners = []
    for unit in job.model.units:
        parts: list[_Scales | _Plain] = []
        places = layout.of(unit.name)
        for p in places:
            codes = found.rounded[p.name].codes if p.name in by_name else None
            if codes is not None and codes.format.float_type in _FLOATS:
                parts.append(_Scales(p, codes, job.device))
            elif p.name not in by_name and p.rows is None and (len(p.shape) == 1 or p.name in tables):
                parts.append(_Plain(p, values_of(job.model, p), vectors, job.device))
        if not parts or len(parts) != len(places):
            continue
        rows = [np.arange(p.parameters // p.cols) if p.rows is None else p.rows for p in places]
        order = None
        if any(p.rows is not None for p in places):
            order = torch.from_numpy(np.argsort(np.concatenate(rows))).to(job.device)
        owners.append(_Owner(unit, tuple(parts), order))
    return owners


def _written(items: Sequence[Item], found: Found, owners: Sequence[_Owner]) -> Found:
    """The plan with numbers as they are now."""
    by_name = {i.place.name: i for i in items}
    rounded, vectors = dict(found.rounded), dict(found.vectors)
    for part in (p for o in owners for p in o.parts):
        name = part.place.name
        if isinstance(part, _Plain):
            vectors[name] = part.values().detach().cpu().numpy().reshape(1, -1)
            continue
        codes, item = part.written(), by_name[name]
        values = codes.values()
        lost = item.lost(torch.from_numpy(values).to(item.device))
        rounded[name] = Rounded(codes, values, *lost, rounded[name].alone)
    return replace(found, rounded=rounded, vectors=vectors)


def tune_blocks(
    job: Job,
    layout: Layout,
    items: Sequence[Item],
    found: Found,
    vectors: str = "F32",
    tables: Collection[str] = (),
) -> tuple[Found, dict[str, Any]]:
    """The plan with tuned numbers where that measures better on the correction tokens, and a record.

    Args:
        job: with an effort of recovery.
        layout: all tensors of the file that may move.
        items: those in block formats.
        found: the plan.
        vectors: the file's type of vectors: F32, F16 or BF16.
        tables: matrices of that type which are tuned as well, number by number.
    """
    assert job.recover is not None  # noqa: S101 (callers ask first)
    quantized_copy = copy_of(job.model.module)
    load_values(quantized_copy, unit_values(job.model, items, {n: r.values for n, r in found.rounded.items()}))
    owners, passes = owners_of(job, layout, items, found, vectors, tables), Passes(job, quantized_copy)
    leaves = [t for o in owners for p in o.parts for t in p.leaves]
    optimizer = torch.optim.Adam(leaves, lr=RATE, betas=(0.9, 0.98), eps=1e-12)
    start = best = passes.check()
    kept: list[Tensor] = []
    with same_again(job.device), job.reporter.step("recovery of scales and vectors", 1) as advance:
        clock = Clock(job.recover, advance)
        while clock.done < 1:
            rate = RATE * min(1.0, (clock.iterations + 1) / _WARMING) * (0.1 + 0.9 * (1 - clock.done))
            _move(passes, owners, optimizer, rate)
            clock.tick()
            if not clock.due(_CHECKS, _APART):
                continue
            with torch.no_grad():
                passes.load({o.unit.name: o.values() for o in owners})
            kl = passes.check()
            if kl < best:
                best, kept = kl, [t.detach().clone() for t in leaves]
            if not kl < _LOST * start:
                job.reporter.note(f"recovery diverges after {clock.iterations} iterations (KL {kl:.4f}): stopped")
                break
    job.reporter.note(
        f"recovery: {clock.iterations} iterations of scales and vectors, KL on the correction tokens {start:.4f} "
        f"before, {best:.4f} after"
    )
    passes.say_short()
    stage = {"stage": "continuous", "moves": clock.iterations, "kl": best}
    record = {"tokens": passes.read, "kl_before": start, "stages": [stage], "curve": passes.curve}
    if not kept:
        return found, record
    with torch.no_grad():
        for leaf, value in zip(leaves, kept, strict=True):
            leaf.copy_(value)
    return replace(_written(items, found, owners), predicted=best), record


def _move(passes: Passes, owners: Sequence[_Owner], optimizer: torch.optim.Adam, rate: float) -> None:
    """Make one iteration at a learning rate."""
    optimizer.zero_grad()
    values = {o.unit.name: o.values() for o in owners}
    passes.load({n: v.detach() for n, v in values.items()})
    _, slopes = passes.gradients(list(values))
    torch.autograd.backward(list(values.values()), [slopes[n].to(v.dtype) for n, v in values.items()])
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
