"""Sum up the ledger, in which every byte of an artifact has an owner and a kind.

Kinds: header, index, side, table, payload, config, tokenizer, code, padding. Those of an exception path have its name
in front ("columns payload").

>>> total([Entry("a", "payload", 3, 4), Entry("(file)", "header", 2)])
5
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bytecap.format.coders import layers

KINDS = ("header", "index", "side", "table", "payload", "config", "tokenizer", "code", "padding")


@dataclass(frozen=True)
class Entry:
    """Bytes of one kind owned by one unit (or by `(file)`, `(shared)` or a side file).

    Attributes:
        parameters: of the owning unit; 0 for owners that hold none.
    """

    unit: str
    kind: str
    bytes: int
    parameters: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Line:
    """The bytes of one owner, by kind."""

    unit: str
    parameters: int
    kinds: dict[str, int]

    @property
    def bytes(self) -> int:
        """Sum over kinds."""
        return sum(self.kinds.values())


def total(entries: Iterable[Entry]) -> int:
    """Return the sum of all entries, which is the file size."""
    return sum(e.bytes for e in entries)


def by_unit(entries: Iterable[Entry]) -> list[Line]:
    """Return one line per owner, largest first."""
    lines: dict[str, Line] = {}
    for e in entries:
        line = lines.setdefault(e.unit, Line(e.unit, e.parameters, {}))
        line.kinds[e.kind] = line.kinds.get(e.kind, 0) + e.bytes
    return sorted(lines.values(), key=lambda line: (-line.bytes, line.unit))


def by_path(entries: Iterable[Entry]) -> dict[str, dict[str, int]]:
    """Return the units and bytes of each kind of overlay.

    >>> by_path([Entry("a", "rows side", 3), Entry("a", "rows payload", 5), Entry("a", "payload", 9)])
    {'rows': {'units': 1, 'bytes': 8}}
    """
    names = {layer.id for layer in layers().values()}
    found: dict[str, dict[str, int]] = {}
    for e in entries:
        path = e.kind.partition(" ")[0]
        if path in names:
            sizes = found.setdefault(path, {})
            sizes[e.unit] = sizes.get(e.unit, 0) + e.bytes
    return {n: {"units": len(sizes), "bytes": sum(sizes.values())} for n, sizes in sorted(found.items())}


def by_kind(entries: Iterable[Entry]) -> dict[str, int]:
    """Return the bytes of every kind in the ledger's order, without zeros; overlays count as their plain kinds."""
    sums = dict.fromkeys(KINDS, 0)
    for e in entries:
        sums[e.kind.rpartition(" ")[2]] += e.bytes
    return {k: v for k, v in sums.items() if v}
