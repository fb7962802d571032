"""Tune the continuous numbers of a GGUF file at frozen codes, and so at the same bytes.

Float16 scales and minimums of blocks, and float32 vectors, follow Adam on the KL to the original; scales are rounded to
float16 in every pass, with the gradient going straight through. From time to time the result is measured on the
correction tokens, and the best of these is written. Integer sub-scales stay as they are: they are shared with codes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from bytecap.runtimes.blocks.layout import pack
from bytecap.runtimes.gguf.export import values_of
from bytecap.runtimes.gguf.menu import Item, Rounded
from bytecap.runtimes.gguf.places import Layout, Place
from bytecap.runtimes.gguf.plan import Found
from bytecap.runtimes.gguf.solve import unit_values
from bytecap.types import Unit

RATE = 1.5e-3  # first learning rate, relative to each number
_WARMING = 10  # iterations until the full rate
_CHECKS, _APART = 8, 5  # validations on the correction tokens, and iterations between two of them at least
_LOST = 4.0  # times the first KL, beyond which tuning is stopped


class _Scales:
    """A tensor in a block format as a function of its float16 numbers."""

    def __init__(self, place: Place, codes: Codes, device: str) -> None:
        self.place, self.codes = place, codes
        rows, per = len(codes.codes), codes.format.block // codes.format.sub
        blocks = codes.scale.shape[1]

        def there(array: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device)

        level = codes.codes.reshape(rows, blocks, per, -1) * codes.sub_scales.reshape(rows, blocks, per, 1).astype(
            np.int16
        )
        self.level = there(level).reshape(rows, blocks, -1)
        less = np.repeat(codes.sub_minimums.reshape(rows, blocks, per), codes.format.sub, 2)
        self.less = there(less) if codes.format.minimums else None
        self.start = there(codes.scale), there(codes.minimum)
        count = 2 if codes.format.minimums else 1
        self.leaves = [torch.zeros_like(s, requires_grad=True) for s in self.start[:count]]

    def numbers(self) -> list[Tensor]:
        """Scale and minimum as the file holds them, with gradient."""
        found = []
        for start, change in zip(self.start, self.leaves, strict=False):
            now = start * (1 + change)
            found.append(now + (now.half().float() - now).detach())
        return found

    def values(self) -> Tensor:
        """(rows, cols) in the file's order, with gradient."""
        numbers = self.numbers()
        found = numbers[0][..., None] * self.level
        if self.less is not None:
            found = found - numbers[1][..., None] * self.less
        return found.reshape(len(self.level), -1)

    def written(self) -> Codes:
        """As the file would hold it now."""
        numbers = [n.detach().half().cpu().numpy() for n in self.numbers()]
        changed = dict(zip(("scale", "minimum"), numbers, strict=False))
        return replace(self.codes, scale=changed["scale"], minimum=changed.get("minimum", self.codes.minimum))


class _Vector:
    """A float32 vector."""

    def __init__(self, place: Place, values: Any, device: str) -> None:
        self.place = place
        self.start = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device)
        self.size = max(float(self.start.abs().mean()), 1e-8)
        self.leaves = [torch.zeros_like(self.start, requires_grad=True)]

    def values(self) -> Tensor:
        """(1, cols), with gradient."""
        return self.start + self.size * self.leaves[0]


@dataclass(frozen=True)
class _Owner:
    """A unit, the values of it that are tuned, and its rows' places in that order."""

    unit: Unit
    parts: tuple[_Scales | _Vector, ...]
    order: Tensor | None

    def values(self) -> Tensor:
        """In stored layout, with gradient."""
        found = torch.cat([p.values() - p.place.offset for p in self.parts])
        if self.order is not None:
            found = found[self.order]
        matrix = found.reshape(self.unit.matrix_shape)
        return (matrix.T if self.unit.transposed else matrix).reshape(self.unit.shape)


def owners_of(job: Job, layout: Layout, items: Sequence[Item], found: Found) -> list[_Owner]:
    """Every unit all of whose stored values can be tuned."""
    by_name = {i.place.name: i for i in items}
    owners = []
    for unit in job.model.units:
        parts: list[_Scales | _Vector] = []
        places = layout.of(unit.name)
        for p in places:
            codes = found.rounded[p.name].codes if p.name in by_name else None
            if codes is not None:
                parts.append(_Scales(p, codes, job.device))
            elif p.name not in by_name and len(p.shape) == 1 and p.rows is None:
                parts.append(_Vector(p, values_of(job.model, p), job.device))
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
    metrics = {i.place.name: i for i in items}
    rounded, vectors = dict(found.rounded), dict(found.vectors)
    for part in (p for o in owners for p in o.parts):
        name = part.place.name
        if isinstance(part, _Vector):
            vectors[name] = part.values().detach().cpu().numpy().reshape(1, -1)
            continue
        codes, item = part.written(), metrics[name]
        values = codes.values()
        error = torch.from_numpy(values - item.weight)
        rounded[name] = Rounded(pack(codes), values, codes, item.metric.distortion(error), item.held.distortion(error))
    return replace(found, rounded=rounded, vectors=vectors)


def tune_blocks(job: Job, layout: Layout, items: Sequence[Item], found: Found) -> tuple[Found, dict[str, Any]]:
    """The plan with tuned numbers where that measures better on the correction tokens, and a record."""
    assert job.recover is not None  # noqa: S101 (callers ask first)
    quantized_copy = copy_of(job.model.module)
    load_values(quantized_copy, unit_values(job.model, items, {n: r.values for n, r in found.rounded.items()}))
    owners, passes = owners_of(job, layout, items, found), Passes(job, quantized_copy)
    leaves = [t for o in owners for p in o.parts for t in p.leaves]
    optimizer = torch.optim.Adam(leaves, lr=RATE, betas=(0.9, 0.98), eps=1e-12)
    start = best = passes.check()
    kept = found
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
                best, kept = kl, _written(items, found, owners)
            if not kl < _LOST * start:
                job.reporter.note(f"recovery diverges after {clock.iterations} iterations (KL {kl:.4f}): stopped")
                break
    job.reporter.note(
        f"recovery: {clock.iterations} iterations of scales and vectors, KL on the correction tokens {start:.4f} "
        f"before, {best:.4f} after"
    )
    passes.say_short()
    stage = {"stage": "continuous", "moves": clock.iterations, "kl": best}
    return replace(kept, predicted=best) if kept is not found else found, {
        "tokens": passes.read, "kl_before": start, "stages": [stage],
    }  # fmt: skip


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
