"""Divide passes that score models among ranks: by batches, or by variants where batches are too few.

>>> from bytecap.system.ranks import ALONE
>>> list(batches_apart(ALONE, [1, 2, 3], lambda some: iter([10 * x for x in some])))
[10, 20, 30]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from bytecap.system.ranks import Ranks, owners

_Value = TypeVar("_Value")
Rows = list[list[float]]  # sums by window: of the original, and two for each variant


def batches_apart(ranks: Ranks, data: Sequence[Any], work: Callable[[Sequence[Any]], Iterator[Any]]) -> Iterator[Any]:
    """Yield what `work` yields for every batch, in order; each rank has its share of batches at once."""
    if ranks.size == 1:
        return work(data)  # streamed models are read once for all batches
    owner = owners([float(ids.numel()) for ids, _, _ in data], ranks.size)
    found = [iter(f) for f in ranks.all(list(work([d for d, r in zip(data, owner, strict=True) if r == ranks.rank])))]
    return iter([next(found[r]) for r in owner])


def variants_apart(
    ranks: Ranks,
    variants: Mapping[str, _Value],
    batches: int,
    work: Callable[[dict[str, _Value]], list[Rows]],
) -> list[Rows]:
    """Return, for every batch, the rows of the original and of all variants, in their order.

    Args:
        ranks: processes.
        variants: what each rank gets some of.
        batches: number of batches.
        work: rows of some variants, for every batch; the original's first.
    """
    owner = dict(zip(variants, owners([1.0] * len(variants), ranks.size), strict=True))
    own = {n: v for n, v in variants.items() if owner[n] == ranks.rank}
    found: list[Rows] = []
    for batch in zip(*ranks.all(work(own) if own else [[]] * batches), strict=True):
        rows = [iter(theirs[1:]) for theirs in batch]
        found.append([batch[0][0], *(next(rows[rank]) for rank in owner.values() for _ in range(2))])
    return found
