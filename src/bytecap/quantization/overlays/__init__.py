"""Encode overlays: change the problem that the base codes, then fit an overlay to the decoded base.

An overlay does not depend on the base below it. Before the base codes a unit, an overlay may change the base's problem
(`before`: protected columns become zeros that cost next to nothing, and the Hessian leaves out the errors that they
will absorb). After the base is coded, it is fitted to the decoded values and encoded (`after`). Reading is the work of
`bytecap.format.coders`, with one file for each overlay under the same name.

One file each; an overlay is found by its module-level `OVERLAY`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytecap.errors import UsageError
from bytecap.types import Unit


@dataclass(frozen=True)
class Ranking:
    """A stream of channels that a matrix is on, ranked by their worth to all matrices on it.

    Attributes:
        stream: its number.
        mode: sides of the matrix it is on, see `bytecap.format.overlays.channels`.
        order: channels by falling worth, (width,); the same array for every matrix.
    """

    stream: int
    mode: int
    order: npt.NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True)
class UnitProblem:
    """A matrix unit that is to be approximated.

    An error `E` of shape (rows, cols) costs `1/2 sum_i rows_i E_i H E_i^T` nats per token.

    Attributes:
        unit: the unit.
        weight: (rows, cols) float32.
        hessian: (cols, cols) float64, damped, positive definite.
        rows: (rows,) float64, mean 1.
        rankings: of the streams it is on; None if streams were not searched for.
    """

    unit: Unit
    weight: Tensor
    hessian: Tensor
    rows: Tensor
    rankings: tuple[Ranking, ...] | None = None

    def distortion(self, values: Tensor) -> float:
        """Return the nats per token that values (rows, cols) in the weight's place cost."""
        error = (values - self.weight).double()
        return float((((error @ self.hessian) * error).sum(1) @ self.rows) / 2)


@dataclass(frozen=True)
class Applied:
    """An overlay as stored over a base.

    Attributes:
        tag, data: as stored, for `bytecap.format.coders.stack`.
        values: (rows, cols) float32, base and overlay decoded, exactly as a reader gives them.
        side: bytes of side information (positions, scales) within `data`.
        share: share of the unit's weights that it protects.
    """

    tag: int
    data: bytes
    values: Tensor
    side: int
    share: float


class Overlay(Protocol):
    """One kind of overlay."""

    id: ClassVar[str]
    charge: ClassVar[int]  # bytes it needs once for the whole file, beyond its overlays

    def settings(self, problem: UnitProblem, base: Tensor | None = None) -> Sequence[Any]:
        """Return the possible settings, cheapest first; empty where the overlay cannot apply.

        `base` (rows, cols) are the base's decoded values, to rank by, if they are known.
        """
        ...

    def before(self, problem: UnitProblem, setting: Any) -> UnitProblem:
        """Return the problem that the base should code instead."""
        ...

    def after(self, problem: UnitProblem, base: Tensor, setting: Any) -> Applied:
        """Fit the overlay to a base's decoded values (rows, cols)."""
        ...


@cache
def overlays() -> dict[str, Overlay]:
    """Return all overlays by name."""
    found: dict[str, Overlay] = {}
    for info in pkgutil.iter_modules(__path__):
        path = getattr(importlib.import_module(f"{__name__}.{info.name}"), "OVERLAY", None)
        if path is not None:
            found[path.id] = path
    return found


def check_names(names: Sequence[str], every: Sequence[str]) -> None:
    """Refuse names of no overlay.

    Raises:
        UsageError: unknown; the message suggests the nearest one.
    """
    for name in names:
        if name not in every:
            near = difflib.get_close_matches(name, every, 1, 0.0)
            raise UsageError(f"unknown overlay {name!r}, did you mean {near[0]}? (there are {', '.join(every)})")


def thinned(ladder: Sequence[Any], most: int) -> Sequence[Any]:
    """Thin a ladder out to at most so many settings, evenly spread, with both ends kept.

    >>> thinned(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(ladder) <= most:
        return ladder
    return [ladder[round(i * (len(ladder) - 1) / (most - 1))] for i in range(most)]


def decoded(coding: Any) -> Tensor:
    """Run one coder's or overlay's decoding generator; returns its values as a tensor."""
    from bytecap.format.coders import run

    return torch.from_numpy(run([coding])[0])
