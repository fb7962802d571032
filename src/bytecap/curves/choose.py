"""Spending bytes over units by falling predicted slope.

Every unit's offers are reduced to their upper hull; hull segments of all units are taken in the order of their
slopes until the bytes are spent. A segment that does not fit ends its unit, so that no unit jumps over one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bytecap.curves.trial import Offer


def hull(offers: Sequence[Offer]) -> list[Offer]:
    """Offers on the upper concave hull of gain over bytes from (0, 0), by rising bytes.

    >>> def at(size, gain): return Offer("p", "u", 0, "", size, gain, gain, 0, 1.0)
    >>> [o.bytes for o in hull([at(10, 1.0), at(20, 1.2), at(40, 4.0), at(50, 3.0)])]
    [40]
    """
    kept: list[Offer] = []
    for o in sorted(offers, key=lambda o: (o.bytes, -o.gain)):
        if o.gain <= (kept[-1].gain if kept else 0.0):
            continue
        if o.bytes <= 0:  # gains for nothing: the best of them is where the hull starts
            kept = [o]
            continue
        while kept and kept[-1].bytes > 0:
            size, gain = (kept[-2].bytes, kept[-2].gain) if len(kept) > 1 else (0.0, 0.0)
            if (kept[-1].gain - gain) * (o.bytes - size) > (o.gain - gain) * (kept[-1].bytes - size):
                break
            kept.pop()
        kept.append(o)
    return kept


def most(offers: Mapping[str, Sequence[Offer]]) -> float:
    """Bytes that all units' last hull offers take together."""
    return sum(max(0.0, hull(o)[-1].bytes) for o in offers.values() if hull(o))


def spend(offers: Mapping[str, Sequence[Offer]], room: float) -> dict[str, Offer]:
    """The offer chosen for each unit, within `room` estimated bytes."""
    segments = []
    for name, mine in offers.items():
        size, gain = 0.0, 0.0
        for rank, o in enumerate(hull(mine)):
            slope = (o.gain - gain) / max(o.bytes - size, 1e-9)
            segments.append((-slope, name, rank, o.bytes - size, o))
            size, gain = o.bytes, o.gain
    chosen: dict[str, Offer] = {}
    ended: set[str] = set()
    for _, name, _, size, o in sorted(segments, key=lambda s: s[:3]):
        if name in ended:
            continue
        if size > room:
            ended.add(name)
            continue
        chosen[name] = o
        room -= size
    return chosen
