"""Say which parts of a model are coded together, so that an effort that is a time goes into tuning, not into codings.

Recoveries code a model part by part and tune what is not coded yet in between. The more parts, the more is tuned; but
every coding has a cost of its own, its walk above all, and where an iteration is fast that cost is most of a short
effort. So as many parts are joined as it takes for the costs of codings to be at most a third of what is left. What a
coding costs is measured: a line through the last ones, some seconds for each and some for every part in it; only the
first of the two is saved by joining. Where the second leave no time to tune in, new codes are not worth it. Nothing
is joined or given up where the effort is a number of iterations.

>>> from bytecap.job.effort import Effort
>>> clock = Clock(Effort(steps=3), lambda _: None)
>>> pace = CodingPace(clock, [["a"], ["b", "c"], ["d"]])
>>> for group in pace:
...     pace.coded()
...     while clock.done < pace.until:
...         clock.tick()
...     print(group, clock.iterations)
['a'] 1
['b', 'c'] 2
['d'] 3
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bytecap.recovery.loop import Clock

_CODING = 1 / 3  # share of what is left that codings may cost, beyond what joining does not save
_MOST = 1 / 2  # share of what is left that joining may not save


class CodingPace:
    """The groups in which parts are coded, one after another; `coded` is called behind each coding.

    Attributes:
        done: parts that are in the groups so far.
        joined: parts in the present group.
        until: share of the effort to which the rest is tuned, before the next group.
        worth: whether the rest leaves time to tune in, as far as is known; who can do without new codes may stop then.
    """

    def __init__(self, clock: Clock, parts: Sequence[list[str]], done: int = 0, *, behind: bool = True) -> None:
        """Begin after some parts.

        Args:
            clock: of the effort.
            parts: names, in the order of coding.
            done: parts that are coded already.
            behind: whether something is left to tune behind the last group.
        """
        self._clock, self._parts, self._behind = clock, parts, behind
        self.done, self.joined, self.until = done, 1, 0.0
        self.worth, self._next, self._started = True, 1, 0.0
        self._measured: list[tuple[int, float]] = []  # parts and seconds of codings

    def __iter__(self) -> Iterator[list[str]]:
        """Yield the names of every group."""
        while self.done < len(self._parts):
            some = self._parts[self.done : self.done + self._next]
            self.joined = len(some)
            self.done += self.joined
            self._started = self._clock.seconds
            yield [n for part in some for n in part]

    @property
    def left(self) -> list[str]:
        """Return the names in parts behind the present group."""
        return [n for part in self._parts[self.done :] for n in part]

    def coded(self) -> None:
        """Take the time that the group's coding took, and choose the next group and how far to tune before it."""
        self._measured.append((self.joined, self._clock.seconds - self._started))
        known = self._measured[1:]  # the first coding compiles kernels
        each, left = _slope(known), len(self._parts) - self.done
        if 2 * left > len(self._parts):  # behind that, most of the price is paid
            self.worth = each * left < _MOST * self._clock.left
        self._next = self._together(left, each, known)
        closing = not self._behind and self._next >= left  # nothing is tuned behind the next group
        self.until = 1.0 if closing else self.done / (len(self._parts) - (not self._behind))

    def _together(self, left: int, each: float, known: Sequence[tuple[int, float]]) -> int:
        """Return how many of the parts that are left to code together, at so many seconds for each."""
        seconds = self._clock.left
        if not known or not left:
            return 1 if seconds > 0 else max(1, left)
        parts, last = known[-1]
        own = max(0.0, last - each * parts)
        most = max(0.0, _CODING * (seconds - each * left))
        return 1 if own * left <= most else math.ceil(left / max(1, int(most / own)))


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Return by how much the second number rises with the first, by least squares, 0 if it falls or is not known.

    >>> _slope([(1, 2.0), (3, 6.0)]), _slope([(2, 3.0)])
    (2.0, 0.0)
    """
    if not points:
        return 0.0
    firsts, seconds = (sum(x) / len(points) for x in zip(*points, strict=True))
    square = sum((x - firsts) ** 2 for x, _ in points)
    product = sum((x - firsts) * (y - seconds) for x, y in points)
    return max(0.0, product / square) if square else 0.0
