"""Recode units as those of the block before them, with a low-rank difference of their own.

Units of a role are paired in the order of the model; the second of a pair takes the decoded values of the first, which
stays at the base. Nothing is trained, so this is what sharing is worth before uptraining (`bytecap_lab.layer_tying`).
The section is the one by which an update refers to its base (docs/format.md): nothing, or a low-rank layer over it.

Source: Relaxed Recursive Transformers (ICLR 2025). Omitted: averages of blocks, training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bytecap.allocation.correction import role_name
from bytecap.format.coders.base import CODER
from bytecap.format.coders.stack import CODER as STACK
from bytecap.job import Section
from bytecap.quantization.overlays.lowrank import OVERLAY, Rank
from bytecap.system.threads import NESTED, in_threads
from bytecap_lab.rd_curves.base import Base
from bytecap_lab.rd_curves.paths import Recoded, Recoding, roles

_RANKS = (0, 4, 16, 64)


@dataclass(frozen=True)
class Borrowed:
    """A setting: whose values a unit takes, and the rank of its own difference."""

    source: str
    rank: int


class SharedBlock:
    """The recoding; a setting is `Borrowed`."""

    id = "shared_block"
    brief = 2

    def refusal(self, base: Base) -> str:
        """Refuse a model without a repeated role."""
        if any(len(names) > 1 for names in roles(base).values()):
            return ""
        return "no two matrices of this model have the same role in different blocks"

    def settings(self, base: Base, name: str) -> Sequence[Borrowed]:
        """Return ranks for every second unit of a role; nothing for the first ones, which are the sources."""
        unit = base.problems[name].unit
        alike = [n for n in roles(base)[role_name(name)] if base.problems[n].unit.matrix_shape == unit.matrix_shape]
        at = alike.index(name)
        ranks = [r for r in _RANKS if 4 * r <= min(unit.matrix_shape)]
        return [Borrowed(alike[at - 1], r) for r in ranks] if at % 2 else []

    def code(self, base: Base, wanted: Mapping[str, Borrowed]) -> dict[str, Recoded]:
        """Refer to the source, and fit the difference."""
        found = in_threads(lambda item: _code(base, *item), list(wanted.items()), most=NESTED)
        return dict(zip(wanted, found, strict=True))


def _code(base: Base, name: str, s: Borrowed) -> Recoded:
    below, section, side = base.units[s.source].values, Section(CODER.tag, b""), 0
    if s.rank:
        layer = OVERLAY.after(base.problems[name], below.clone(), Rank(s.rank, 8))
        section = Section(STACK.tag, STACK.encode((CODER.tag, b""), [(layer.tag, layer.data)]))
        side = layer.side
    return Recoded(section, side=side, below=below)


RECODINGS: tuple[Recoding, ...] = (SharedBlock(),)
