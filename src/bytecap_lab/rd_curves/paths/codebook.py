"""Recode units as indices into codewords of a tensor's own, of its role or of the whole file.

The size of a codebook is the amount: more codewords cost bytes once and bits for every vector. A tensor's own are
fitted by weighted k-means at about the base's rate and a bit above, as ClusComp's are. Shared ones are fitted to
vectors of all units of the scope, each divided by its spread; a unit then has a scale, which is its rate.

Sources: `bytecap.methods.baselines.cluscomp` and `shared_codewords`. Omitted: tuning of codewords.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bytecap.allocation.correction import role_name
from bytecap.format.coders.codebook import CODER
from bytecap.job import Section
from bytecap.methods.baselines import shared_codewords
from bytecap.methods.baselines.cluscomp import OPTIONS, ClusComp, CodebookSetting
from bytecap.methods.baselines.shared_codewords import STEPS, System
from bytecap_lab.rd_curves.base import Base
from bytecap_lab.rd_curves.paths import SEED, Recoded, Recoding, material, rate, roles

_MOST = 10  # binary logarithm of codewords
_ABOVE = (0.0, 0.75)  # bits a weight above the base's rate, before the entropy coder takes its share
_HEADROOM = (0.5, 1.5)  # likewise, of shared codewords, before a scale makes them coarser
_SPREAD = 2  # quarter octaves between scales


class OwnCodebook:
    """Codewords of the tensor's own; a setting is a `CodebookSetting`."""

    id = "codebook"
    brief = 2

    def refusal(self, base: Base) -> str:
        """Acts on every base."""
        del base
        return ""

    def settings(self, base: Base, name: str) -> Sequence[CodebookSetting]:
        """Return codewords of 1 to 4 weights near the base's rate that take at most a quarter of the tensor."""
        rows, cols = base.problems[name].unit.matrix_shape
        found = set()
        for g in (1, 2, 3, 4):
            for above in _ABOVE:
                n = 1 << min(_MOST, max(1, round(g * (rate(base, [name]) + above))))
                if g <= cols and 4 * n * g <= rows * cols:
                    found.add(CodebookSetting(n, g))
        return sorted(found, key=lambda s: (math.log2(s.n) / s.g, s.g))

    def code(self, base: Base, wanted: Mapping[str, CodebookSetting]) -> dict[str, Recoded]:
        """Fit codewords to each unit."""
        family = ClusComp({**OPTIONS, "weighted": True}, SEED)
        found = {}
        for name, setting in wanted.items():
            mine = material(base, name)
            section = family.section(mine, family.encode(mine, setting.number).kept)
            found[name] = Recoded(section, side=setting.n * setting.g)
        return found


@dataclass(frozen=True)
class Words:
    """A setting: shared codewords, and the unit's scale by its number in `STEPS`."""

    n: int
    g: int
    step: int
    shared: str = field(repr=False)


@dataclass(frozen=True)
class SharedCodebook:
    """Codewords that a role or the file shares; a setting is `Words`."""

    id: str
    by_role: bool
    brief: int = 2

    def refusal(self, base: Base) -> str:
        """Acts on every base."""
        del base
        return ""

    def _scope(self, base: Base, name: str) -> tuple[str, list[str]]:
        """Name and units of the scope that a unit belongs to."""
        return (role_name(name), roles(base)[role_name(name)]) if self.by_role else ("file", list(base.problems))

    def _sizes(self, base: Base, names: Sequence[str]) -> list[tuple[int, int]]:
        """Return (codewords, dimension) for a scope, smallest first."""
        bits = rate(base, names)
        found = {(1 << min(_MOST, max(1, round(d * (bits + h)))), d) for d in (2, 3) for h in _HEADROOM}
        return sorted(s for s in found if math.log2(s[0]) / s[1] > bits) or sorted(found)[-1:]

    def settings(self, base: Base, name: str) -> Sequence[Words]:
        """Return codebooks of the scope, at scales near the base's rate and finer."""
        scope, names = self._scope(base, name)
        if self.by_role and len(names) < 2:
            return []
        cols, found = base.problems[name].unit.matrix_shape[1], list[Words]()
        for n, d in [s for s in self._sizes(base, names) if s[1] <= cols]:
            middle = round(4 * (math.log2(n) / d - rate(base, [name]))) + 1
            steps = {min(len(STEPS) - 1, max(0, middle - k * _SPREAD)) for k in (0, 1, 2)}
            found += [Words(n, d, k, f"{scope}: {n} x {d}") for k in sorted(steps, reverse=True)]
        return found

    def _system(self, base: Base, names: Sequence[str], words: Words) -> System:
        """Fit the codewords of a scope once."""
        key = (self.id, words.shared)
        if key not in base.memo:
            materials = [material(base, n) for n in names]
            base.memo[key] = shared_codewords.book(materials, words.n, words.g, byte=True, seed=SEED)
        found: System = base.memo[key]
        return found

    def code(self, base: Base, wanted: Mapping[str, Words]) -> dict[str, Recoded]:
        """Look up every unit's vectors in its scope's codewords."""
        found, order = {}, list(roles(base))
        for name, words in wanted.items():
            _, names = self._scope(base, name)
            system, weight = self._system(base, names, words), base.problems[name].weight.to(base.device)
            number = self._sizes(base, names).index((words.n, words.g))
            number = number * len(order) + order.index(role_name(name)) if self.by_role else number
            scale = shared_codewords.stored_scale(weight, words.step)
            indices, _ = system.code(weight, scale)
            data = CODER.encode_shared(indices, (words.n, words.g), number, scale)
            objects = dict(enumerate(system.objects(), number))
            found[name] = Recoded(Section(CODER.tag, data), side=2, objects=objects, users=len(names))
        return found


RECODINGS: tuple[Recoding, ...] = (
    OwnCodebook(), SharedCodebook("role_codebook", by_role=True), SharedCodebook("file_codebook", by_role=False),
)  # fmt: skip
