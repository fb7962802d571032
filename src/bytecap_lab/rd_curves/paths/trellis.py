"""Recode units along a trellis of more states, at the step they have.

More states cost hardly a byte and distort less; they are paid for in search time. The base's own states are those of
`Options()`. Only the default method's grid has a trellis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bytecap.job import Section
from bytecap.quantization.options import EFFORTS
from bytecap_lab.rd_curves.base import Base, GridBase
from bytecap_lab.rd_curves.paths import Recoded, Recoding


class Trellis:
    """The recoding; a setting is a number of states."""

    id = "trellis"
    brief = 1  # 128 and 256 states take 16 and 32 times as long as the base's

    def refusal(self, base: Base) -> str:
        """Refuse a base without a trellis."""
        if isinstance(base, GridBase):
            return ""
        return "this base rounds every weight by itself and packs the integers with brotli: it has no trellis"

    def settings(self, base: Base, name: str) -> Sequence[int]:
        """Return the numbers of states above the base's own that `--effort` offers."""
        del name
        return [s for s in EFFORTS if isinstance(base, GridBase) and s > base.planner.options.states]

    def code(self, base: Base, wanted: Mapping[str, int]) -> dict[str, Recoded]:
        """Round the base's problems again."""
        found: dict[str, Recoded] = {}
        if not isinstance(base, GridBase):
            return found
        for states in sorted(set(wanted.values())):
            names = [n for n, s in wanted.items() if s == states]
            rounded = base.with_states(states).round([replace(base.problems[n]) for n in names], 0.0)
            for name, section in zip(names, base.sections(rounded), strict=True):
                found[name] = Recoded(Section(section.tag, section.data))
        return found


RECODINGS: tuple[Recoding, ...] = (Trellis(),)
