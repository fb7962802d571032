"""Choose the amount of `channels` that all matrices on a stream take together, with one list of positions.

Every matrix may choose its own amount along its own curve, but a list that all of them name is stored once. So for
every stream one amount is chosen, the one that gains most at the plan's slope over all matrices on it, each of which
takes it or leaves it; then all other amounts are struck from the menu. Streams are settled one after the other, the
one of most matrices first, since a matrix on two streams takes the list of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bytecap.format.wire.positions import write_positions
from bytecap.format.wire.shared_objects import LIST_ENTRY, REFERENCE, write_list
from bytecap.quantization.overlays.protect import Amount
from bytecap.types import Curve, Point


def list_size(amount: Amount) -> int:
    """Return the bytes of an amount's positions inside an overlay."""
    return len(write_positions(amount.index, len(amount.order)))


def saved(amount: Amount, users: int) -> int:
    """Return the bytes that several overlays save if an amount's list is stored once.

    >>> wide = Amount(64, 8, 1, np.arange(512) * 5 % 512, 0)
    >>> list_size(wide), saved(wide, 1), saved(wide, 10)
    (35, 0, 275)
    """
    own, once = list_size(amount), len(write_list(amount.index, len(amount.order))) + LIST_ENTRY
    return max(0, users * (own - REFERENCE) - once)


def _amount(point: Point) -> Amount | None:
    """Return a point's amount of channels, if it is one."""
    amount = getattr(point, "amount", None)
    return amount if isinstance(amount, Amount) and amount.stream >= 0 else None


def _on(point: Point, stream: int, count: int | None = None) -> bool:
    """Return whether a point takes `count` of a stream's channels, or any number of them."""
    amount = _amount(point)
    return amount is not None and amount.stream == stream and count in (None, amount.count)


def _gain(curves: Sequence[Curve], stream: int, count: int, slope: float) -> float:
    """Return the gain of an amount over all curves in nats, with bytes at the slope and the list stored once."""
    gain, users, some = 0.0, 0, None
    for c in curves:
        without = min((p.distortion + slope * p.rate for p in c.points if not _on(p, stream)), default=np.inf)
        mine = [p for p in c.points if _on(p, stream, count)]
        least = min((p.distortion + slope * p.rate for p in mine), default=np.inf)
        if least < without:
            gain, users, some = gain + without - least, users + 1, _amount(mine[0])
    return gain + slope * saved(some, users) if some is not None else 0.0


def one_list(curves: Sequence[Curve], slope: float) -> list[Curve]:
    """Return the curves with one amount left for every stream, and none for a stream where no amount gains.

    Args:
        curves: of every unit, corrected; points on `channels` know their `Amount`.
        slope: nats per byte of the plan.
    """
    kept = list(curves)
    amounts = {(a.stream, a.count) for c in curves for p in c.points if (a := _amount(p)) is not None}
    for stream in sorted({s for s, _ in amounts}):
        gains = {k: _gain(kept, stream, k, slope) for s, k in sorted(amounts) if s == stream}
        best = max(gains, key=gains.__getitem__)
        taken = best if gains[best] > 0 else 0
        kept = [Curve(c.name, tuple(p for p in c.points if not _on(p, stream) or _on(p, stream, taken))) for c in kept]
    return kept
