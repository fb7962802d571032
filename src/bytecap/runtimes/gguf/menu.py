"""Every tensor in every type: bytes of the file against distortion on tokens that no Hessian saw.

A Hessian of few tokens promises more than it keeps: on a real model of 135M parameters, distortion on other windows was
three times the distortion it was minimised to. So there are two: one to round by, one of windows held out to judge by.
How far the first is trusted (`shrunk`) is chosen by the second, role by role, and allocation sees nothing else.
Large matrices are judged by an even sample of their rows. Every matrix is rounded once for every type that may hold it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.allocation.correction import role_name
from bytecap.calibration.metric import Metric, join
from bytecap.calibration.probe import Statistics
from bytecap.errors import UsageError
from bytecap.model.checkpoint import Model, as_matrix
from bytecap.progress import Advance
from bytecap.runtimes.blocks import Codes
from bytecap.runtimes.blocks.encode import Form, encode, prepare, shrunk
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.blocks.layout import pack
from bytecap.runtimes.blocks.search import LANES
from bytecap.runtimes.gguf.file import PLAIN, decode, encode_plain, padded, type_bytes
from bytecap.runtimes.gguf.places import Layout, Place
from bytecap.types import Curve, Point, Unit

SHRINKAGES = (0.0, 0.03, 0.1, 0.3, 1.0)  # how much of a Hessian is given up, see `shrunk`
_SAMPLE = 2**17  # weights by which a matrix is judged
_TRIAL = ("Q4_K", "Q4_0")  # types by which Hessians are judged: the first that fits
WHOLE = (*FORMATS, "F16", "BF16", "F32")


@dataclass(frozen=True)
class Item:
    """A tensor of the file that types compete for.

    Attributes:
        place: where it goes.
        weight: float32 (rows, cols), in the file's order.
        metric: to round by.
        held: of windows held out, to judge by.
        types: that may hold it.
        shrinkage: how much of the Hessian's off-diagonal part is given up.
    """

    place: Place
    weight: npt.NDArray[np.float32]
    metric: Metric
    held: Metric
    types: tuple[str, ...]
    shrinkage: float = 0.0

    @property
    def role(self) -> str:
        """Name without numbers, and shape."""
        return f"{role_name(self.place.name)} {self.weight.shape}"

    def form(self, shrinkage: float | None = None) -> Form:
        """The Hessian as rounding wants it."""
        return prepare(shrunk(self.metric.hessian, self.shrinkage if shrinkage is None else shrinkage))

    def sampled(self, weights: int = _SAMPLE) -> tuple[Item, float]:
        """Return the item with an even sample of its rows, and the factor from its distortion to the whole's."""
        rows, cols = self.weight.shape
        count = max(LANES, weights // cols)
        if rows <= count:
            return self, 1.0
        chosen = np.linspace(0, rows - 1, count).astype(np.intp)
        part = self.metric.rows[chosen], self.held.rows[chosen]
        share = float(part[1].sum()) / max(float(self.held.rows.sum()), 1e-300)
        metric, held = (replace(m, rows=r) for m, r in zip((self.metric, self.held), part, strict=True))
        item = replace(self, weight=self.weight[chosen], metric=metric, held=held)
        return item, 1 / share if share > 0 else rows / count


def parse_types(names: Sequence[str] | None) -> tuple[str, ...]:
    """Types of a list such as `q4_k,q6_k`; all of them if None.

    >>> parse_types(["q4_k", "Q6_K"])
    ('Q4_K', 'Q6_K')

    Raises:
        UsageError: a name is unknown.
    """
    if names is None:
        return tuple(n for n in WHOLE if n != "F32")
    found = [n.strip().upper() for n in names]
    for n in found:
        if n not in WHOLE:
            raise UsageError(f"unknown GGUF type {n.lower()}: there are {', '.join(t.lower() for t in WHOLE)}")
    return tuple(dict.fromkeys(found))


def allowed(place: Place, types: Sequence[str], *, pure: bool) -> tuple[tuple[str, ...], bool]:
    """Types of a list that can hold a tensor, and whether they are in place of the list because none of it can.

    Raises:
        UsageError: `pure`, and none can.
    """
    fits = tuple(t for t in WHOLE if t in PLAIN or FORMATS[t].fits(place.cols))
    found = tuple(t for t in types if t in fits)
    if found:
        return found, False
    blocks = tuple(t for t in fits if t in FORMATS) or tuple(t for t in fits if t in PLAIN)
    if pure:
        raise UsageError(
            f"{place.name} has {place.cols} columns, which none of {', '.join(types).lower()} can hold; "
            f"{', '.join(blocks).lower()} can"
        )
    return blocks, True


def items_of(
    model: Model, layout: Layout, seen: Statistics, held: Statistics, types: Mapping[str, tuple[str, ...]]
) -> list[Item]:
    """Everything that types compete for; a matrix that calibration does not reach costs nothing and gets little."""
    units = {u.name: u for u in model.units}
    found = []
    for place in layout.places:
        if place.name not in types:
            continue
        unit = units[place.unit]
        matrix = as_matrix(unit, model.tensor(unit).detach()).float().cpu().numpy()
        weight = np.ascontiguousarray(place.to_file(matrix), np.float32)
        metrics = [_metric(unit, s, place) for s in (seen, held)]
        found.append(Item(place, weight, metrics[0], metrics[1], types[place.name]))
    return found


def _metric(unit: Unit, found: Statistics, place: Place) -> Metric:
    rows, cols = unit.matrix_shape
    if unit.name in found.uses:
        whole = join(found.uses[unit.name], found.tokens)
    else:
        whole = Metric(torch.eye(cols, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64))
    whole = Metric(whole.hessian.cpu(), whole.rows.cpu())
    return whole if place.rows is None else replace(whole, rows=whole.rows[torch.from_numpy(place.rows)])


def choose_shrinkage(items: Sequence[Item], advance: Advance) -> list[Item]:
    """Items with the shrinkage that loses least on held-out windows, one for every role."""
    roles: dict[str, list[Item]] = {}
    for item in items:
        roles.setdefault(item.role, []).append(item)
    best: dict[str, float] = {}
    for role, members in roles.items():
        totals = dict.fromkeys(SHRINKAGES, 0.0)
        name = next((t for t in _TRIAL if FORMATS[t].fits(members[0].place.cols)), None)
        if name is not None:
            for item in _spread(members):
                for shrinkage in SHRINKAGES:
                    codes = encode(item.weight, item.form(shrinkage), FORMATS[name])
                    totals[shrinkage] += item.held.distortion(_error(codes.values(), item.weight))
        best[role] = min(totals, key=totals.__getitem__)
        advance(1)
    return [replace(i, shrinkage=best[i.role]) for i in items]


def _spread(members: Sequence[Item]) -> list[Item]:
    """Samples of a few members of a role: first, middle and last."""
    picked = sorted({0, len(members) // 2, len(members) - 1})
    return [members[i].sampled()[0] for i in picked]


def _error(values: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(values - weight)


def curve(item: Item) -> Curve:
    """Measured points of a tensor: a point's setting is its type's place in `WHOLE`."""
    part, factor = item.sampled()
    form, points = item.form(), []
    for name in item.types:
        if name in FORMATS:
            values = encode(part.weight, form, FORMATS[name]).values()
        else:
            values = decode(name, encode_plain(name, part.weight), part.weight.shape[1])
        lost = factor * part.held.distortion(_error(values, part.weight))
        size = padded(type_bytes(name, *item.weight.shape))
        points.append(Point(size, lost if math.isfinite(lost) else 0.0, WHOLE.index(name)))
    return Curve(item.place.name, tuple(sorted(points, key=lambda p: p.rate)))


@dataclass(frozen=True)
class Rounded:
    """A tensor in its type.

    Attributes:
        data: uint8 (rows, row bytes).
        values: float32 (rows, cols), decoded.
        codes: None for floating-point types.
        seen: distortion in the metric it was rounded by, nats per token.
        held: in that of the windows held out.
    """

    data: npt.NDArray[np.uint8]
    values: npt.NDArray[np.float32]
    codes: Codes | None
    seen: float
    held: float


def round_to(item: Item, name: str) -> Rounded:
    """A tensor in a type."""
    codes = encode(item.weight, item.form(), FORMATS[name]) if name in FORMATS else None
    data = pack(codes) if codes is not None else encode_plain(name, item.weight)
    values = codes.values() if codes is not None else decode(name, data, item.weight.shape[1])
    error = _error(values, item.weight)
    return Rounded(data, values, codes, item.metric.distortion(error), item.held.distortion(error))
