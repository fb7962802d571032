"""Divide the passes of targets among ranks, and bring the inputs of every stage to all of them.

Every rank then fits and codes the stage as one process does, from the inputs of all passes in their order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import Tensor

from bytecap.system.ranks import Ranks

_Item = TypeVar("_Item")
# inputs of the original, those behind the coded prefix, and perhaps what the stream lacks that outputs are added to
Inputs = tuple[Tensor, ...]


class LostError(Exception):
    """A pass did not call its modules in the order of the stages."""


def of_rank(passes: Sequence[_Item], ranks: Ranks) -> Sequence[_Item]:
    """Return the passes of this rank."""
    return passes[ranks.rank :: ranks.size]


def together(ranks: Ranks, work: Callable[[], _Item]) -> _Item:
    """Return the result of work on this rank's passes.

    Raises:
        LostError: on all ranks, where a pass of any of them was somewhere else.
    """
    if ranks.size == 1:
        return work()
    found: list[_Item] = []
    with contextlib.suppress(LostError):
        found.append(work())
    if not all(ranks.all(bool(found))):
        raise LostError
    return found[0]


def shared_inputs(
    ranks: Ranks, own: Callable[[], Iterable[Inputs]], passes: int, device: str, width: int = 2
) -> Iterable[Inputs]:  # fmt: skip
    """Return the inputs of a stage for all passes, in their order.

    Args:
        ranks: processes, each with the passes that `of_rank` gives it.
        own: inputs for this rank's passes.
        passes: number of all passes.
        device: torch device.
        width: tensors of a pass.

    Raises:
        LostError: see `together`.
    """
    if ranks.size == 1:
        return own()
    sent = [t for found in together(ranks, lambda: list(own())) for t in found]
    arrived = [iter(tensors) for tensors in ranks.exchange([sent] * ranks.size, device)]
    return [tuple(next(arrived[i % ranks.size]) for _ in range(width)) for i in range(passes)]
