"""Decide what is measured: which units are tried, the amounts of every path, and a sample of single units."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bytecap.allocation.correction import role_name
from bytecap.quantization.overlays import UnitProblem, thinned
from bytecap_lab.rd_curves.choose import bundled, hull, members, most, recode, spend
from bytecap_lab.rd_curves.operating_point import OperatingPoint
from bytecap_lab.rd_curves.paths import recodings, roles
from bytecap_lab.rd_curves.trial import COARSER, STEP, STEPS, OverlayCandidate

AMOUNTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
TOP = 0.1  # most bytes an overlay is given, as a share of the base
_SLOPE = STEPS.index(1 / 16)  # step whose predicted bytes and nats price all recodings

OverlayCandidates = dict[str, dict[str, list[OverlayCandidate]]]
Plan = dict[str, OverlayCandidate]


@dataclass(frozen=True)
class Effort:
    """The work that each recoding is worth.

    Attributes:
        shares: of the matrices that are recoded, one whole-model point each.
        brief: a unit is tried with few settings only.
    """

    shares: tuple[float, ...]
    brief: bool


BRIEF, FULL = Effort((1 / 4, 1.0), brief=True), Effort(AMOUNTS, brief=False)


def tried_units(operating_point: OperatingPoint, most_units: int | None) -> list[str]:
    """Return the units that paths act on, in the order of the model: all, or at most so many of a role.

    Half of them (rounded up) are spread evenly over the blocks, the others are those in which a single weight carries
    the largest share of the output's energy: there a super-weight would be, and there exceptions should pay.
    """
    base = operating_point.base
    if most_units is None:
        return list(base.problems)
    kept: set[str] = set()
    for names in roles(base).values():
        even = -(-most_units // 2)
        spread = thinned(names, even) if even > 1 else [names[len(names) // 2]]
        rest = sorted(set(names) - set(spread), key=lambda n: (-peak(base.problems[n]), n))
        kept |= {*spread, *rest[: most_units - len(spread)]}
    return [n for n in base.problems if n in kept]


def peak(problem: UnitProblem) -> float:
    """Return the share of a unit's output energy that its strongest weight carries.

    >>> import torch
    >>> from bytecap.types import Unit
    >>> one = torch.ones(1).double()
    >>> peak(UnitProblem(Unit("a", (1, 2), "F32"), torch.tensor([[3.0, 1.0]]), torch.eye(2).double(), one))
    0.9
    """
    energy = problem.weight.double().square() * problem.hessian.diagonal() * problem.rows[:, None]
    return float(energy.max() / energy.sum().clamp_min(1e-300))


def planned(operating_point: OperatingPoint, promised: OverlayCandidates, path: str, effort: Effort) -> list[Plan]:
    """Choose units and settings for each amount of a path; empty plans are left out."""
    mine = promised[path]
    sizes = {n: len(operating_point.sections[n].data) for n in mine}
    if path == COARSER:
        count = max((len(units) for units in mine.values()), default=0)
        found = [{n: units[i] for n, units in mine.items()} for i in range(count)]
    elif path in recodings():
        slope = _slope(promised[STEP])
        found = [recode(mine, sizes, slope, share) for share in effort.shares]
    else:
        bundles = bundled(mine)
        top = min(TOP * sum(sizes.values()), most(bundles))
        found = [members(spend(bundles, a * top)) for a in AMOUNTS]
    return [p for i, p in enumerate(found) if p and (path not in recodings() or p not in found[:i])]


def _slope(steps: Mapping[str, Sequence[OverlayCandidate]]) -> float:
    """Return the predicted nats per byte of a slightly finer step of all units."""
    finer = [mine[_SLOPE] for mine in steps.values()]
    return sum(o.gain for o in finer) / max(1.0, sum(o.bytes for o in finer))


def sample(promised: OverlayCandidates, points: int, seed: int) -> list[OverlayCandidate]:
    """Draw candidates to measure unit by unit, equally many for every path and role if there are enough.

    Offers on their unit's hull come first: no other one would ever be taken, and most others are so small that what
    they recover is lost in the noise. Recodings and coarser steps are one cell each, whatever the role.
    """
    rng = random.Random(f"sample {seed}")  # noqa: S311
    cells: dict[tuple[str, str], list[tuple[bool, OverlayCandidate]]] = {}
    for name, units in promised.items():
        for unit, mine in units.items():
            corners = hull(mine)
            role = "" if name == COARSER or name in recodings() else role_name(unit)
            for o in mine:
                cells.setdefault((role, name), []).append((o in corners, o))
    for cell in cells.values():
        rng.shuffle(cell)
        cell.sort(key=lambda x: x[0])  # taken from the end
    taken: list[OverlayCandidate] = []
    order = sorted(cells)
    while len(taken) < points and any(cells.values()):
        rng.shuffle(order)
        taken += [cells[key].pop()[1] for key in order if cells[key]]
    return taken[: max(points, len(cells))]
