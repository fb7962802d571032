"""Bring the integers of units that ranks have rounded apart to all of them.

Searching and pricing need numbers of each unit only. Integers are sent when values are asked for, a unit at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bytecap.allocation.planner import Planner, State
from bytecap.quantization.quantizer import Coded


def gathered(planner: Planner, state: State, names: Sequence[str]) -> State:
    """Return the state with the integers of these units on every rank.

    Args:
        planner: its ranks and units.
        state: settled by all ranks.
        names: units, the same on all ranks.
    """
    apart = [n for n in names if n in state.coded and state.coded[n].owner is not None]
    if not apart:
        return state
    devices = {p.unit.name: str(p.device) for p in planner.matrices}
    return replace(
        state, coded={**state.coded, **{n: _whole(planner, state.coded[n], devices[n]) for n in apart}}
    )  # fmt: skip


def _whole(planner: Planner, coded: Coded, device: str) -> Coded:
    """Return one unit with its integers."""
    ranks, source = planner.ranks, coded.owner
    assert source is not None  # noqa: S101 (asked before)
    own = [torch.from_numpy(coded.code.symbols)] if source == ranks.rank else None
    (symbols,) = ranks.spread(own, source, device)
    if own is not None:
        return coded.owned(None)
    return planner.keep(replace(coded, code=replace(coded.code, symbols=symbols.cpu().numpy()), owner=None))
