"""Parse the effort that users allow: a number of steps or a time.

>>> Effort.parse("45s").part(0.5)
(Effort(steps=None, seconds=22.5), Effort(steps=None, seconds=22.5))
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from bytecap.errors import UsageError


@dataclass(frozen=True)
class Effort:
    """An effort: `steps` iterations, or iterations for `seconds`.

    >>> Effort.parse("600"), Effort.parse("10m")
    (Effort(steps=600, seconds=None), Effort(steps=None, seconds=600.0))
    """

    steps: int | None = None
    seconds: float | None = None

    @staticmethod
    def parse(text: str) -> Effort:
        """Parse `600` steps, or a time such as `45s`, `10m`, `1h`.

        Raises:
            UsageError: it is neither, or nothing.
        """
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text.strip())
        if not found or (not found[2] and "." in found[1]) or float(found[1]) <= 0:
            raise UsageError(f"--recover {text!r} is neither a number of steps (600) nor a time (45s, 10m, 1h)")
        if not found[2]:
            return Effort(steps=int(found[1]))
        return Effort(seconds=float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]])

    def share(self, steps: int, seconds: float) -> float:
        """Return the share of the effort that is spent, up to 1."""
        if self.steps is not None:
            return steps / self.steps if self.steps else 1.0
        return seconds / (self.seconds or math.inf)

    def part(self, share: float) -> tuple[Effort, Effort]:
        """Split the effort in two: a share, and the rest.

        >>> Effort.parse("10").part(0.85)
        (Effort(steps=8, seconds=None), Effort(steps=2, seconds=None))
        """
        if self.steps is not None:
            first = round(self.steps * share)
            return Effort(steps=first), Effort(steps=self.steps - first)
        whole = self.seconds or 0.0
        return Effort(seconds=whole * share), Effort(seconds=whole * (1 - share))

    def longer(self, seconds: float) -> Effort:
        """Return the effort with some seconds more, where it is a time.

        >>> Effort.parse("45s").longer(1.5), Effort.parse("10").longer(1.5)
        (Effort(steps=None, seconds=46.5), Effort(steps=10, seconds=None))
        """
        return self if self.seconds is None else Effort(seconds=self.seconds + seconds)


def effort_of(text: str | None) -> Effort | None:
    """Return the effort asked for.

    Raises:
        UsageError: it cannot be understood.
    """
    return None if text is None else Effort.parse(text)
