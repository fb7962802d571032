"""Spend bytes over units by falling predicted slope.

Every unit's candidates are reduced to their upper hull; hull segments of all units are taken in the order of their
slopes until the bytes are spent. A segment that does not fit ends its unit, so that no unit jumps over one.

Offers of one list for all matrices of a stream (`channels`) are summed before: the stream takes the place of a unit.

Recodings may give bytes back, and most lose at any size, so they are not given an amount of bytes but a share of the
matrices: those that lose least of what finer steps would make of the bytes (`recode`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bytecap_lab.rd_curves.trial import OverlayCandidate


@dataclass(frozen=True)
class Bundle(OverlayCandidate):
    """Offers of several units that are taken together; bytes, gains and the rest are their sums."""

    members: tuple[OverlayCandidate, ...] = ()


def _bundle(stream: int, index: int, members: Sequence[OverlayCandidate]) -> Bundle:
    size, gain, slope, alone = (
        sum(x) for x in zip(*((o.bytes, o.gain, o.slope, o.alone) for o in members), strict=True)
    )
    side, share = sum(o.side for o in members), sum(o.share for o in members)
    return Bundle(members[0].path, f"stream {stream}", index, members[0].list, size, gain, slope, alone, side, share,
                  stream, members[0].list, tuple(members))  # fmt: skip


def bundled(candidates: Mapping[str, Sequence[OverlayCandidate]]) -> dict[str, list[OverlayCandidate]]:
    """Offers as they can be chosen: those of a stream's units for the same list as one, all others as they are.

    Units that would lose by a list are left out of it. A unit on two streams goes with the one whose hull starts
    steeper.

    >>> def at(unit, gain, stream):
    ...     return OverlayCandidate("p", unit, 0, "", 10, gain, 0, gain, 0, 0.1, stream, f"{stream} 1")
    >>> units = {"a": [at("a", 2.0, 0), at("a", 1.0, 1)], "b": [at("b", 1.0, 0)], "c": [at("c", 4.0, 1)]}
    >>> [(n, [o.bytes for o in mine]) for n, mine in bundled(units).items()]
    [('stream 1', [20]), ('stream 0', [10])]
    """
    streams: dict[int, dict[str, list[OverlayCandidate]]] = {}
    for o in (o for mine in candidates.values() for o in mine if o.stream >= 0 and o.gain > 0):
        streams.setdefault(o.stream, {}).setdefault(o.list, []).append(o)
    found = {n: some for n, mine in candidates.items() if (some := [o for o in mine if o.stream < 0])}
    taken: set[str] = set()
    while streams:
        left = {
            s: [_bundle(s, i, free) for i, members in enumerate(lists.values())
                if (free := [o for o in members if o.unit not in taken])]
            for s, lists in streams.items()
        }  # fmt: skip
        best = max(left, key=lambda s: max((b.gain / max(b.bytes, 1e-9) for b in left[s]), default=0.0))
        if left[best]:
            found[f"stream {best}"] = list(left[best])
            taken |= {o.unit for b in left[best] for o in b.members}
        del streams[best]
    return found


def members(chosen: Mapping[str, OverlayCandidate]) -> dict[str, OverlayCandidate]:
    """The candidate of each unit, bundles taken apart."""
    return {o.unit: o for b in chosen.values() for o in (b.members if isinstance(b, Bundle) else (b,))}


def hull(candidates: Sequence[OverlayCandidate]) -> list[OverlayCandidate]:
    """Offers on the upper concave hull of gain over bytes from (0, 0), by rising bytes.

    >>> def at(size, gain): return OverlayCandidate("p", "u", 0, "", size, gain, 0, gain, 0, 1.0)
    >>> [o.bytes for o in hull([at(10, 1.0), at(20, 1.2), at(40, 4.0), at(50, 3.0)])]
    [40]
    """
    kept: list[OverlayCandidate] = []
    for o in sorted(candidates, key=lambda o: (o.bytes, -o.gain)):
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


def most(candidates: Mapping[str, Sequence[OverlayCandidate]]) -> float:
    """Bytes that all units' last hull candidates take together."""
    return sum(max(0.0, hull(o)[-1].bytes) for o in candidates.values() if hull(o))


def spend(candidates: Mapping[str, Sequence[OverlayCandidate]], room: float) -> dict[str, OverlayCandidate]:
    """The candidate chosen for each unit, within `room` estimated bytes."""
    segments = []
    for name, mine in candidates.items():
        size, gain = 0.0, 0.0
        for rank, o in enumerate(hull(mine)):
            slope = (o.gain - gain) / max(o.bytes - size, 1e-9)
            segments.append((-slope, name, rank, o.bytes - size, o))
            size, gain = o.bytes, o.gain
    chosen: dict[str, OverlayCandidate] = {}
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


def recode(
    candidates: Mapping[str, Sequence[OverlayCandidate]], sizes: Mapping[str, int], slope: float, share: float
) -> dict[str, OverlayCandidate]:
    """Choose what is recoded: each unit's best setting, of those units that gain most or lose least.

    Units of a scope use one object, the one that serves them best on average.

    Args:
        candidates: by unit name.
        sizes: bytes of the units' sections at the base.
        slope: nats per byte that a finer step buys.
        share: of the bytes of all sections that have a candidate.

    >>> def at(unit, size, gain, shared=""):
    ...     return OverlayCandidate("p", unit, 0, "", size, gain, 0, gain, 0, 1.0, -1, shared)
    >>> units = {"a": [at("a", -10, -0.5), at("a", 0, -2.0)], "b": [at("b", 0, -0.1)], "c": []}
    >>> [(n, o.bytes) for n, o in recode(units, {"a": 100, "b": 100, "c": 9}, 0.1, 1.0).items()]
    [('a', -10), ('b', 0)]
    >>> list(recode(units, {"a": 100, "b": 100, "c": 9}, 0.1, 0.25))
    ['a']
    """

    def worth(o: OverlayCandidate) -> float:
        return o.gain - slope * o.bytes

    best: dict[str, dict[str, OverlayCandidate]] = {}  # of a unit by object, "" where it needs none
    for name, mine in candidates.items():
        for o in mine:
            kept = best.setdefault(name, {})
            if o.list not in kept or worth(o) > worth(kept[o.list]):
                kept[o.list] = o
    objects = {o.list for units in best.values() for o in units.values()}
    scopes: dict[str, list[tuple[float, str]]] = {}
    for shared in objects:
        worths = [worth(units[shared]) for units in best.values() if shared in units]
        scopes.setdefault(shared.partition(": ")[0], []).append((sum(worths) / len(worths), shared))
    serving = {max(found)[1] for found in scopes.values()}
    chosen = {
        n: max((o for shared, o in units.items() if shared in serving), key=worth)
        for n, units in best.items() if serving & set(units)
    }  # fmt: skip
    room, taken = share * sum(sizes[n] for n in chosen), dict[str, OverlayCandidate]()
    for name in sorted(chosen, key=lambda n: -worth(chosen[n]) / max(1, sizes[n])):
        if not taken or sum(sizes[n] for n in taken) + sizes[name] <= room + 1e-6:
            taken[name] = chosen[name]
    return taken
