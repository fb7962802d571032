"""Work on many units at once, on as many threads as torch may use.

Threads help because compiled loops and large arrays release Python's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_In = TypeVar("_In")
_Out = TypeVar("_Out")
NESTED = 8  # workers at most where each opens threads of its own


def in_threads(work: Callable[[_In], _Out], items: Sequence[_In], *, most: int | None = None) -> list[_Out]:
    """Return `work(item)` of every item, in order.

    Args:
        work: called on several threads at once.
        items: its arguments.
        most: workers at most, and never more than torch may use threads. Work that asks torch for decompositions or
            products takes `NESTED`: every worker opens a pool of as many threads as torch may use, so that without a
            bound their number is squared, 4,000 on a machine of 64.

    >>> in_threads(lambda x: x * x, [1, 2, 3])
    [1, 4, 9]
    """
    count = min(torch.get_num_threads(), len(items), len(items) if most is None else most)
    if count <= 1:
        return [work(x) for x in items]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, items))
