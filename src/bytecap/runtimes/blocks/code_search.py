"""How long the codes of a block format are looked for."""

from __future__ import annotations

from typing import NamedTuple

from bytecap.runtimes.blocks import BlockFormat

SWEEPS = 2
WIDTH, UNEVEN = 8, 4  # ways to round a row side by side; of uneven levels, which gain less by it
TRIALS, THOROUGH_SWEEPS, THOROUGH_WIDTH = (1.0, 0.96, 0.98, 1.02, 1.04), 6, 16  # of what is written, see `search_of`
_SPAN = 64


class CodeSearch(NamedTuple):
    """How long codes are looked for.

    Attributes:
        sweeps: of coordinate descent after error feedback.
        width: ways to round a row's columns that are kept side by side (`bytecap.runtimes.blocks.beam`).
        trials: factors of a block's scale; the one whose ways lose least is taken.
    """

    sweeps: int
    width: int
    trials: tuple[float, ...] = (1.0,)


def search_of(layout: BlockFormat, *, thorough: bool = False) -> CodeSearch:
    """How long to look for codes of a layout; `thorough`: for what is written, not only compared.

    That takes five times as long and gains 3% of the distortion where 64 columns or more share all scales; with
    sub-scales it gains less than 1%, so it is not done there.
    """
    if thorough and span(layout):
        return CodeSearch(THOROUGH_SWEEPS, THOROUGH_WIDTH, TRIALS)
    return CodeSearch(SWEEPS, UNEVEN if layout.levels else WIDTH)


def span(layout: BlockFormat) -> int:
    """Columns that share all scales, within which coding may take any order; 0 where that gains nothing.

    Below 64 columns it gains less than 1% of the distortion, at 128 some 2%, with a whole row of 256 some 4%. Codes
    that are vectors stay together.
    """
    return layout.sub if layout.sub >= _SPAN and not layout.vector else 0
