"""Parse and format sizes and budgets such as `3000000`, `3MB` (decimal) and `3MiB` (binary).

>>> parse_size("3MB"), parse_size("3M"), parse_size("3MiB"), parse_size("600kB"), parse_size(1000)
(3000000, 3000000, 3145728, 600000, 1000)
>>> parse_budget("3.5bpp", 1_000_000), parse_budget("3MB", 1_000_000), split_budgets("3MB,4,000,000,3.5bpp")
(437500, 3000000, ['3MB', '4,000,000', '3.5bpp'])
>>> check_budget("3.5")
Traceback (most recent call last):
bytecap.errors.UsageError: cannot read the size '3.5', which has no unit: write 3.5MB for millions of bytes, or \
3.5bpp for bits per parameter of a model
>>> format_size(3_000_000)
'3,000,000 bytes (3.000 MB, 2.861 MiB)'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from bytecap.errors import UsageError

_FACTORS = {
    "": 1, "b": 1,
    "k": 10**3, "m": 10**6, "g": 10**9,
    "kb": 10**3, "mb": 10**6, "gb": 10**9,
    "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip
_SIZE = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*bpp", re.IGNORECASE)
_LISTED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])[^,]*|[^,]+")
_MOST, _HIGHEST = 1 << 62, 1 << 10  # bytes; bits per parameter, where side files may be larger than a model
_SIZES = "use bytes (3000000), 3MB (decimal) or 3MiB (binary)"
_BUDGETS = "use bytes (3000000), 3MB (decimal), 3MiB (binary) or 3.5bpp (bits per parameter)"


def parse_size(size: int | str) -> int:
    """Parse a size; returns bytes.

    Args:
        size: a count of bytes, or text such as `3000000`, `3MB`, `2.5 MiB`, `600kB`.

    Raises:
        UsageError: not a size, or not at least one byte.
    """
    return _parsed(size, _SIZES)


def _parsed(size: int | str, forms: str) -> int:
    """Read a number of bytes; `forms` says what may be written."""
    if isinstance(size, int):
        value: float = size
    else:
        match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
        factor = _FACTORS.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise UsageError(f"cannot read the size {size!r}: {forms}")
        if "." in match[1] and not match[2]:
            raise UsageError(
                f"cannot read the size {size!r}, which has no unit: write {match[1]}MB for millions of bytes, or "
                f"{match[1]}bpp for bits per parameter of a model"
            )
        value = float(match[1].replace("_", "").replace(",", "")) * factor
    if value < 1:
        raise UsageError(f"the budget must be at least one byte, not {size}")
    if value > _MOST:
        raise UsageError(f"the size {str(size)[:40]} is more than any disk holds")
    return int(value)


def parse_budget(budget: int | str, parameters: int) -> int:
    """Parse a budget for a model; returns bytes.

    Args:
        budget: a size as `parse_size` reads it, or bits per parameter such as `3.5bpp`.
        parameters: of the model.

    Raises:
        UsageError: not a budget, or not at least one byte.
    """
    if isinstance(budget, str) and (match := _RATE.fullmatch(budget.strip())):
        rate = float(match[1])
        if rate > _HIGHEST:
            raise UsageError(f"{budget[:40]} is more bits per parameter than any number has")
        return parse_size(max(1, int(rate * parameters / 8)) if rate else 0)
    return _parsed(budget, _BUDGETS)


def check_budget(budget: int | str) -> None:
    """Refuse a budget that no model could have, before a model is loaded.

    Raises:
        UsageError: see `parse_budget`.
    """
    parse_budget(budget, 8 * 10**9)


def split_budgets(text: str) -> list[str]:
    """Split budgets at commas, except those between groups of three digits of a number."""
    return [m[0].strip() for m in _LISTED.finditer(text)]


def format_size(count: int) -> str:
    """Format a size in bytes and in both units."""
    if count < 1_000_000:
        return f"{count:,} bytes ({count / 1e3:.1f} kB, {count / 2**10:.1f} KiB)"
    return f"{count:,} bytes ({count / 1e6:.3f} MB, {count / 2**20:.3f} MiB)"


T = TypeVar("T")


def in_groups(items: Iterable[T], size: Callable[[T], int], most: int, count: int | None = None) -> Iterator[list[T]]:
    """Yield consecutive groups of at most `count` items and a summed size of at most `most`; larger items stand alone.

    >>> list(in_groups([3, 4, 9, 1, 1, 1], int, 8, 2))
    [[3, 4], [9], [1, 1], [1]]
    """
    group: list[T] = []
    held = 0
    for item in items:
        if group and (len(group) == count or held + size(item) > most):
            yield group
            group, held = [], 0
        group.append(item)
        held += size(item)
    if group:
        yield group


def in_parts(items: Sequence[T], size: Callable[[T], int], most: int, *, fill: bool = False) -> list[list[T]]:
    """Split items, in their order, into at most `most` parts of about equal summed sizes, none of them empty.

    An item belongs to the part that its middle is in; parts that a large item spans are left out.

    Args:
        items: to split.
        size: of an item.
        most: parts, at least one.
        fill: give spanned parts to the items behind the large one, one each; a middle between two parts is in the first
            of them then, else in the second.

    >>> in_parts([9, 1, 1, 1], int, 4), in_parts([9, 1, 1, 1], int, 4, fill=True)
    ([[9], [1, 1, 1]], [[9], [1], [1], [1]])
    """
    twice, held, number = 2 * max(1, sum(map(size, items))), 0, -1
    parts: list[list[T]] = []
    for item in items:
        middle = (2 * held + size(item)) * most
        at = min((middle - 1) // twice, number + 1) if fill else middle // twice
        at = max(0, min(at, most - 1))  # items of no size stand at the ends
        if not parts or at > number:
            parts.append([])
            number = at
        parts[-1].append(item)
        held += size(item)
    return parts
