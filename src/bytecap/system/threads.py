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


def in_threads(work: Callable[[_In], _Out], items: Sequence[_In]) -> list[_Out]:
    """Return `work(item)` of every item, in order.

    >>> in_threads(lambda x: x * x, [1, 2, 3])
    [1, 4, 9]
    """
    count = min(torch.get_num_threads(), len(items))
    if count <= 1:
        return [work(x) for x in items]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, items))
