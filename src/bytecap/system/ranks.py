"""Divide a job among processes that all run it, and give every one of them the results in the order of one process.

Every rank goes through the whole job, and only what is worth it is divided: `each` gives a piece of work to one rank
and its result to all of them, in the order of the pieces. Sums are added afterwards, by everybody and in that order,
so what follows cannot tell how many ranks there are.

`Ranks` itself is the one process of a plain job, for which all of this costs nothing; `bytecap.system.distributed`
has several, and only that module knows torch.distributed.

>>> ALONE.each([3.0, 1.0], lambda i: 10 * i)
[0, 10]
>>> owners([5, 3, 3, 2, 2, 1], 2)
[0, 1, 1, 0, 1, 0]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_Found = TypeVar("_Found")


def started() -> bool:
    """Return whether `torchrun` has started this process as one of several."""
    told = os.environ
    return all(n in told for n in ("RANK", "MASTER_ADDR", "MASTER_PORT")) and int(told.get("WORLD_SIZE", "1")) > 1


def owners(costs: Sequence[float], size: int) -> list[int]:
    """Return the rank that does each piece of work: the dearest first, always to whoever has least to do.

    Args:
        costs: of every piece, in any unit.
        size: number of ranks.
    """
    load = [0.0] * size
    found = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[i] = min(range(size), key=lambda r: (load[r], r))
        load[found[i]] += costs[i]
    return found


def _same(value: Any) -> Any:
    return value


class Ranks:
    """The only process of a job; the interface of several.

    Values that travel are what JSON can hold, and besides bytes and numpy arrays; tuples arrive as lists. All ranks
    make the same calls in the same order.

    Attributes:
        rank: number of this process, from 0; rank 0 writes, and speaks to the user.
        size: number of processes.
        on_host: of them, those that share this host's memory.
    """

    rank = 0
    size = 1
    on_host = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def at_end(self, call: Callable[[], Any]) -> None:
        """Have something done when the process is ended outside of its main thread, such as removing work files."""
        del call

    def each(
        self,
        costs: Sequence[float],
        work: Callable[[int], _Found],
        *,
        sent: Callable[[_Found], Any] = _same,
        read: Callable[[Any], _Found] = _same,
    ) -> list[_Found]:
        """Return `work(i)` of every piece, in order; each is done by one rank.

        Args:
            costs: of every piece.
            work: does piece i.
            sent: turns a result into a value that travels.
            read: turns it back.
        """
        del sent, read
        return [work(i) for i in range(len(costs))]

    def all(self, value: Any) -> list[Any]:
        """Return the values of all ranks."""
        return [value]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return what rank 0 makes."""
        return make()

    def agree(self, about: Mapping[str, Any]) -> None:
        """Refuse to go on unless these values, by what they are called, are the same on all ranks.

        Raises:
            UsageError: the first value that differs, and two ranks that have different ones, are named.
        """
        del about

    def spread(self, tensors: Sequence[Tensor] | None, source: int, device: str) -> list[Tensor]:
        """Return the tensors of rank `source`; the others pass None and have them on `device`."""
        del source, device
        assert tensors is not None  # noqa: S101 (the only rank has them)
        return list(tensors)

    def exchange(self, outgoing: Sequence[Sequence[Tensor]], device: str) -> list[list[Tensor]]:
        """Send tensors to every rank, and return what every rank has sent here, on `device`.

        Args:
            outgoing: by the rank that they go to.
            device: torch device of the tensors that arrive.
        """
        del device
        return [list(tensors) for tensors in outgoing]


ALONE = Ranks()
