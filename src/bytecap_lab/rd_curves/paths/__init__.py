"""Code units anew with another coder than the base's; every other file here holds one family of such recodings.

An overlay (`bytecap.quantization.overlays`) adds bytes to a section of the base. A recoding takes the section's place:
codewords, latents, signs, a longer trellis, another block's values. It may cost bytes or give some back, and it may
need objects that units share (a codebook), which are charged once for all of them. Sections are made by the coders of
the format and decoded by its readers, so bytes and values are real ones from the start.

A file here offers `RECODINGS`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from bytecap.allocation.correction import role_name
from bytecap.format.coders import coder, run
from bytecap.format.wire.shared_objects import load_objects
from bytecap.job import Section
from bytecap.methods.baselines.sampled_curves import Material
from bytecap_lab.rd_curves.base import Base

SEED = 0  # of codewords and networks


@dataclass(frozen=True)
class Recoded:
    """A unit in another coding.

    Attributes:
        section: tag and bytes, which take the place of the base's.
        side: bytes of side information in it.
        share: share of the unit's weights that it protects, 1 where it treats all alike.
        objects: shared objects that the section refers to, by number.
        users: units that may use these objects; a prediction divides their bytes among them.
        below: values (rows, cols) of another unit that the section refers to, or None.
    """

    section: Section
    side: int = 0
    share: float = 1.0
    objects: Mapping[int, bytes] = field(default_factory=dict)
    users: int = 1
    below: Tensor | None = None


class Recoding(Protocol):
    """One kind of recoding."""

    @property
    def id(self) -> str:
        """Its name."""
        ...

    @property
    def brief(self) -> int:
        """Settings that a unit is tried with in a brief run."""
        ...

    def refusal(self, base: Base) -> str:
        """Return why it cannot act on any unit of a base; empty if it can."""
        ...

    def settings(self, base: Base, name: str) -> Sequence[Any]:
        """Return the settings for a unit, cheapest first; empty where it cannot apply.

        Settings whose `shared` is not empty need the object of that name, of which a scope, the part before the colon,
        uses one.
        """
        ...

    def code(self, base: Base, wanted: Mapping[str, Any]) -> dict[str, Recoded]:
        """Code units at one setting each."""
        ...


@cache
def recodings() -> dict[str, Recoding]:
    """Return all recodings by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {r.id: r for m in modules for r in getattr(m, "RECODINGS", ())}


def coded(base: Base, path: str, wanted: Mapping[str, tuple[int, Any]]) -> dict[str, Recoded]:
    """Code units of a path, each at (index, setting); what was coded before is remembered in the base."""
    missing = {n: s for n, (i, s) in wanted.items() if (path, n, i) not in base.memo}
    found = recodings()[path].code(base, missing) if missing else {}
    base.memo.update({(path, n, wanted[n][0]): r for n, r in found.items()})
    return {n: base.memo[path, n, i] for n, (i, _) in wanted.items()}


def values_of(base: Base, found: Mapping[str, Recoded]) -> dict[str, Tensor]:
    """Decode recoded units by the reader's coders; returns float32 (rows, cols) by name."""
    codings = []
    for name, r in found.items():
        unit = base.problems[name].unit
        shared = base.shared
        if r.objects:
            spare = next(iter(r.objects.values()))  # stands where the file would have other units' objects
            objects = load_objects([r.objects.get(i, spare) for i in range(max(r.objects) + 1)])
            shared = replace(shared, objects=objects)
        if r.below is not None:
            shared = replace(shared, below=r.below.numpy())
        codings.append(coder(r.section.tag).decode(r.section.data, unit.matrix_shape, unit.dtype, shared))
    return {n: torch.from_numpy(v) for n, v in zip(found, run(codings), strict=True)}


def roles(base: Base) -> dict[str, list[str]]:
    """Return the names of a base's units by role, in the order of the model."""
    found: dict[str, list[str]] = {}
    for name in base.problems:
        found.setdefault(role_name(name), []).append(name)
    return found


def rate(base: Base, names: Sequence[str]) -> float:
    """Return the bits a weight of units at the base."""
    size = sum(base.units[n].estimate for n in names)
    return 8 * size / max(1, sum(base.problems[n].unit.parameters for n in names))


def material(base: Base, name: str) -> Material:
    """Return a unit as the baselines' codebooks take it, on the base's device."""
    problem = base.problems[name]
    diagonal = problem.hessian.diagonal()
    columns = (diagonal / diagonal.mean().clamp(min=1e-30)).float()
    weight, columns, rows = (t.to(base.device) for t in (problem.weight, columns, problem.rows.float()))
    return Material(problem.unit, weight, float(diagonal.mean()) / 2, columns, rows)
