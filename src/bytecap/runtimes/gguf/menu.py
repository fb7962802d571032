"""Every tensor in every type: bytes of the file against distortion on tokens that no Hessian saw.

A Hessian of few tokens promises more than it keeps: on a real model of 135M parameters, distortion on other windows was
three times the distortion it was minimised to. So there are two: one to round by, one of windows held out to judge by.
How far the first is trusted (`shrunk`) is chosen by the second, role by role, and allocation sees nothing else.
Large matrices are judged by an even sample of their rows. Every matrix is rounded once for every type that may hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.allocation.correction import role_name
from bytecap.calibration.metric import Metric, join
from bytecap.calibration.sums import Statistics
from bytecap.calibration.triangle import mirrored
from bytecap.errors import UsageError
from bytecap.model.checkpoint import Model
from bytecap.progress import Advance
from bytecap.runtimes.blocks import BlockFormat
from bytecap.runtimes.blocks.encode import Factors, Shrinkage, encode_all, factor, shrunk
from bytecap.runtimes.blocks.ggml import FORMATS
from bytecap.runtimes.blocks.search import LANES
from bytecap.runtimes.gguf.file import PLAIN
from bytecap.runtimes.gguf.places import Layout, Place
from bytecap.types import Unit, as_matrix

_NONE = Shrinkage()
SHRINKAGES = (
    _NONE, *(Shrinkage(diagonal=s) for s in (0.03, 0.1, 0.3, 1.0)),
    *(Shrinkage(mean=s) for s in (0.01, 0.03, 0.1, 0.3, 1.0)),
)  # fmt: skip
_TIE = 1.005  # times the least distortion: of candidates up to here the one that was fitted least is taken
SAMPLE = 2**17  # weights by which a matrix is judged
_HESSIANS = 0.7  # of a device's memory, beyond which Hessians are kept elsewhere
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
        shrinkage: how far the Hessian is drawn to its diagonal and the mean of that.
        device: where it is rounded; metrics may be kept elsewhere.
        spans: lengths of spans within which columns are coded in sorted order.
    """

    place: Place
    weight: npt.NDArray[np.float32]
    metric: Metric
    held: Metric
    types: tuple[str, ...]
    shrinkage: Shrinkage = _NONE
    device: str = "cpu"
    spans: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def role(self) -> str:
        """Name without numbers, and shape."""
        return f"{role_name(self.place.name)} {self.shape}"

    def under(self, shrinkage: Shrinkage) -> Item:
        """Return the item with its Hessian drawn so far."""
        return replace(self, shrinkage=shrinkage)

    def sorting(self, spans: tuple[int, ...]) -> Item:
        """Return the item with columns of such spans coded in sorted order."""
        return replace(self, spans=spans)

    def factors(self, shrinkage: Shrinkage | None = None, within: int = 0) -> Factors:
        """The Hessian as rounding wants it, columns sorted `within` spans (`bytecap.runtimes.blocks.encode.span`)."""
        hessian = self.metric.hessian.to(self.device)
        return factor(shrunk(hessian, self.shrinkage if shrinkage is None else shrinkage), within)

    def lost(self, values: Tensor) -> tuple[float, float]:
        """Distortion of decoded values (rows, cols), nats per token: as rounding sees it, and on windows held out."""
        error = values - torch.from_numpy(self.weight).to(values.device)
        seen, held = (Metric(m.hessian.to(error.device), m.rows.to(error.device)) for m in (self.metric, self.held))
        return seen.distortion(error), held.distortion(error)

    def alone(self, values: Tensor) -> tuple[float, float]:
        """Return `lost` as if columns' errors had nothing to do with one another, as no Hessian's fit has them.

        The one over the other is how much the two sets of windows differ, whatever is fitted to one of them.
        """
        error = (values - torch.from_numpy(self.weight).to(values.device)).double().square()
        seen, held = (
            float((error @ m.hessian.diagonal().to(error.device)) @ m.rows.to(error.device)) / 2
            for m in (self.metric, self.held)
        )
        return seen, held

    def sampled(self, weights: int = SAMPLE) -> tuple[Item, float]:
        """Return the item with an even sample of its rows, and the factor from its distortion to the whole's."""
        rows, cols = self.shape
        count = max(LANES, weights // cols)
        if rows <= count:
            return self, 1.0
        chosen = np.linspace(0, rows - 1, count).astype(np.intp)
        metric, held = self.metric, self.held
        share = float(held.rows[chosen].sum()) / max(float(held.rows.sum()), 1e-300)
        metric, held = (replace(m, rows=m.rows[chosen]) for m in (metric, held))
        item = Item(self.place, self.weight[chosen], metric, held, self.types, self.shrinkage, self.device, self.spans)
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
    model: Model, layout: Layout, seen: Statistics, held: Statistics, types: Mapping[str, tuple[str, ...]],
    device: str = "cpu",
) -> list[Item]:  # fmt: skip
    """Everything that types compete for, to be rounded on a device; uses the statistics up.

    A matrix that calibration does not reach costs nothing and gets little.
    """
    units = {u.name: u for u in model.units}
    places: dict[str, list[Place]] = {}
    for place in layout.places:
        if place.name in types:
            places.setdefault(place.unit, []).append(place)
    kept, found = _kept_on(device, seen, held), {}
    for name, members in places.items():
        unit = units[name]
        matrix = as_matrix(unit, model.tensor(unit).detach()).float().cpu().numpy()
        metrics = [_metric(unit, s, kept) for s in (seen, held)]
        for place in members:
            weight = np.ascontiguousarray(place.to_file(matrix), np.float32)
            own = [m if place.rows is None else replace(m, rows=m.rows[place.rows]) for m in metrics]
            found[place.name] = Item(place, weight, own[0], own[1], types[place.name], device=device)
    return [found[p.name] for p in layout.places if p.name in found]


def _kept_on(device: str, seen: Statistics, held: Statistics) -> str:
    """Where Hessians stay: on the device if they leave room there."""
    if torch.device(device).type != "cuda":
        return "cpu"
    total = sum(u.moment.nbytes for s in (seen, held) for uses in s.uses.values() for u in uses)
    return device if 2 * total < _HESSIANS * torch.cuda.get_device_properties(device).total_memory else "cpu"


def _metric(unit: Unit, found: Statistics, device: str) -> Metric:
    rows, cols = unit.matrix_shape
    if unit.name not in found.uses:
        return Metric(torch.eye(cols, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64))
    whole = join(found.uses.pop(unit.name), found.tokens)
    lower = whole.hessian.tril()  # sums of products differ across the diagonal in the last bit, work files keep a half
    return Metric(mirrored(lower).to(device), whole.rows.cpu())


def choose_shrinkage(items: Sequence[Item], advance: Advance) -> list[Item]:
    """Items with the shrinkage that loses least on held-out windows, one for every role."""
    roles: dict[str, list[Item]] = {}
    for item in items:
        roles.setdefault(item.role, []).append(item)
    best: dict[str, Shrinkage] = {}
    for role, members in roles.items():
        best[role] = _NONE
        name = next((t for t in _TRIAL if FORMATS[t].fits(members[0].place.cols)), None)
        if name is not None:
            few = spread(members)
            lost = {s: _lost(few, s, FORMATS[name]) for s in SHRINKAGES}
            least = min(held for _, held in lost.values())
            near = {s: held / max(seen, 1e-300) for s, (seen, held) in lost.items() if held <= _TIE * least}
            best[role] = min(near, key=near.__getitem__, default=_NONE)
        advance(1)
    return [i.under(best[i.role]) for i in items]


def _lost(items: Sequence[Item], shrinkage: Shrinkage, layout: BlockFormat) -> tuple[float, float]:
    """Distortion of items rounded under a shrinkage: as their own Hessians see it, and on windows held out."""
    coded = encode_all([i.weight for i in items], [i.factors(shrinkage) for i in items], layout)
    found = [i.lost(values) for i, (_, values) in zip(items, coded, strict=True)]
    return sum(seen for seen, _ in found), sum(held for _, held in found)


def spread(members: Sequence[Item]) -> list[Item]:
    """Samples of a few members of a role: first, middle and last."""
    picked = sorted({0, len(members) // 2, len(members) - 1})
    return [members[i].sampled()[0] for i in picked]
