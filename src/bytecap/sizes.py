"""Sizes and budgets: `3000000`, `3MB` (decimal) and `3MiB` (binary) never get mixed up.

>>> parse_size("3MB"), parse_size("3MiB"), parse_size("600kB"), parse_size(1000)
(3000000, 3145728, 600000, 1000)
>>> format_size(3_000_000)
'3,000,000 bytes (3.000 MB, 2.861 MiB)'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from bytecap.errors import UsageError

_FACTORS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9,
    "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip
_SIZE = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """Number of bytes meant by `size`.

    Args:
        size: a count of bytes, or text such as `3000000`, `3MB`, `2.5 MiB`, `600kB`.

    Raises:
        UsageError: not a size, or not at least one byte.
    """
    if isinstance(size, int):
        value: float = size
    else:
        match = _SIZE.fullmatch(size.strip())
        factor = _FACTORS.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise UsageError(f"cannot read the size {size!r}: use bytes (3000000), 3MB (decimal) or 3MiB (binary)")
        value = float(match[1].replace("_", "").replace(",", "")) * factor
    if value < 1:
        raise UsageError(f"the budget must be at least one byte, not {size}")
    return int(value)


def parse_budget(budget: int | str, parameters: int) -> int:
    """Number of bytes meant by a budget: a size, or bits per parameter such as `4.5bpp`.

    >>> parse_budget("4.5bpp", 1000), parse_budget("3kB", 1000)
    (562, 3000)

    Raises:
        UsageError: it is neither.
    """
    if isinstance(budget, str) and budget.strip().lower().endswith("bpp"):
        try:
            return max(1, int(float(budget.strip()[:-3]) * parameters / 8))
        except (ValueError, OverflowError) as exc:
            raise UsageError(f"cannot read the budget {budget!r}: use 3000000, 3MB, 3MiB or 3.5bpp") from exc
    return parse_size(budget)


def format_size(count: int) -> str:
    """Both units, once, so that nobody mixes them up."""
    if count < 1_000_000:
        return f"{count:,} bytes ({count / 1e3:.1f} kB, {count / 2**10:.1f} KiB)"
    return f"{count:,} bytes ({count / 1e6:.3f} MB, {count / 2**20:.3f} MiB)"


T = TypeVar("T")


def in_groups(items: Iterable[T], size: Callable[[T], int], most: int, count: int | None = None) -> Iterator[list[T]]:
    """Consecutive groups whose sizes add up to at most `most`, of at most `count` items; a larger item stands alone.

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
