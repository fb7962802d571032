"""Iterate while an effort lasts, check on held-out tokens when it is due, and keep the best: the loop of all tuning.

What is tuned differs (steps and vectors, codewords, scales of blocks, a streamed model's values); when to check, which
result to keep and when to stop do not. An effort is a number of iterations or a time (`Clock`).

>>> from bytecap.job.effort import Effort
>>> at, seen = [4.0], []
>>> def iterate(rate):  # gradient descent on x^2
...     at[0] -= rate * at[0]
...     return at[0] ** 2
>>> clock = Clock(Effort(steps=6), seen.append)
>>> schedule = Schedule(warming=2, checks=3, apart=1)
>>> [round(x, 3) for x in tune(iterate, lambda: (at[0] ** 2, at[0]), clock, schedule, 16.0, print)]
[0.001, 0.031]
>>> clock.iterations, round(sum(seen), 6)
(6, 1.0)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from bytecap.job.effort import Effort
from bytecap.progress import Advance
from bytecap.sizes import in_groups

Kept = TypeVar("Kept")

_A_PART = 4  # iterations between two changes of what is tuned, at least
_DIVERGED = 4.0  # times the first KL, beyond which tuning is stopped
_WORSE, _PATIENCE = 1.1, 3  # times the best KL, and checks in a row that may be beyond it
_TOGETHER = 2**26  # values that are moved together: a GPU holds some copies of them


class Clock:
    """Measure how much of an effort is done, and say when a validation on held-out tokens is due.

    Attributes:
        iterations: made so far.
        done: share of the effort, 1 when it is spent.
        validated: `done` and `iterations` at the last validation.
    """

    def __init__(self, effort: Effort, advance: Advance, share: float = 1.0) -> None:
        """Start the clock; `advance` is told about progress, which adds up to `share`."""
        self._effort, self._share, self._advance = effort, share, advance
        self._started = time.monotonic()
        self.iterations, self.done, self.validated = 0, effort.share(0, 0.0), (0.0, 0)

    def resume(self, iterations: int, seconds: float, validated: tuple[float, int] = (0.0, 0)) -> None:
        """Continue after so many iterations in so many seconds, and from the last validation."""
        self._started -= seconds
        self.validated = validated
        self.tick(iterations)

    def tick(self, iterations: int = 1) -> None:
        """Count iterations that were made."""
        self.iterations += iterations
        before = self.done
        self.done = min(1.0, self._effort.share(self.iterations, self.seconds))
        self._advance((self.done - before) * self._share)

    def parts(self, most: int) -> int:
        """Return in how many parts to split the effort, each of some iterations: at most so many."""
        steps = self._effort.steps
        return most if steps is None else max(1, min(most, steps // _A_PART))

    def due(self, validations: int, apart: int = 1) -> bool:
        """Return whether a validation is due: so many in all, at least so many iterations apart, and one at the end."""
        done, iterations = self.validated
        if self.done < 1 and (self.done - done < 1 / validations or self.iterations - iterations < apart):
            return False
        self.validated = self.done, self.iterations
        return True

    @property
    def seconds(self) -> float:
        """Return the seconds since the first iteration, without the time between two runs."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Return the seconds that are left of an effort that is a time, infinitely many of another."""
        seconds = self._effort.seconds
        return math.inf if seconds is None else max(0.0, seconds - self.seconds)


@dataclass(frozen=True)
class Schedule:
    """The rates of a loop, and its checks.

    Attributes:
        warming: iterations until the full rate.
        checks: validations on the correction tokens.
        apart: iterations between two of them, at least.
        last: share of the full rate that is left at the end, to which it falls evenly.
        what: the tuned values, for messages.
    """

    warming: int
    checks: int
    apart: int
    last: float = 0.0
    what: str = "values"

    def rate(self, clock: Clock) -> float:
        """Return the share of the first rates for the next iteration."""
        return warmed(clock, self.warming) * (self.last + (1 - self.last) * (1 - clock.done))


def warmed(clock: Clock, iterations: int) -> float:
    """Return the share of the full rate while it still rises, over so many iterations."""
    return min(1.0, (clock.iterations + 1) / iterations)


def has_diverged(kl: float, start: float) -> bool:
    """Return whether a KL is so far beyond that of the start that tuning does not come back; NaN is."""
    return not kl < _DIVERGED * start


def diverging(clock: Clock, what: str, kl: float) -> str:
    """Return the message about tuning that was stopped."""
    return f"recovery diverges after {clock.iterations} iterations of {what} (KL {kl:.4f}): stopped"


def adam(rates: Iterable[tuple[Tensor, float]], betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.Adam:
    """Return Adam over tensors, if any, each at a first rate of its own; it moves nothing until `set_rates`."""
    alike: dict[float, list[Tensor]] = {}
    for tensor, rate in rates:
        alike.setdefault(rate, []).append(tensor)
    groups = [
        {"params": some, "first": rate}
        for rate, tensors in alike.items() for some in in_groups(tensors, Tensor.numel, _TOGETHER)
    ]  # fmt: skip
    return torch.optim.Adam(groups or [{"params": [], "first": 0.0}], lr=0.0, betas=betas, eps=1e-12)


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set the rates of an optimizer's groups to a share of their first ones, `first`."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["first"]


def keep_only(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Let an optimizer forget all tensors but these, and what it has kept for the others."""
    wanted = {id(t) for t in tensors}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in wanted]
    for p in [p for p in optimizer.state if id(p) not in wanted]:
        del optimizer.state[p]


def tune(
    iterate: Callable[[float], float],
    check: Callable[[], tuple[float, Kept | None]],
    clock: Clock,
    schedule: Schedule,
    start: float,
    note: Callable[[str], None],
) -> tuple[float, Kept | None]:
    """Iterate until the effort is spent or the KL gets worse; returns the lowest KL and what had it.

    Args:
        iterate: makes an iteration at a share of the first rates, and returns the KL on its tokens; one that is not
            finite ends the loop.
        check: returns the KL on the correction tokens, and what to keep if it is the lowest: a snapshot, or None
            where nothing may be kept, such as a file beyond its cap.
        clock: of the effort.
        schedule: rates and checks.
        start: KL on the correction tokens before.
        note: told why the loop ended before the effort did.

    Returns:
        `start` and None where no check was lower.
    """
    best, kept, worse = start, None, 0
    while clock.done < 1:
        sound = math.isfinite(iterate(schedule.rate(clock)))
        clock.tick()
        if sound and not clock.due(schedule.checks, schedule.apart):
            continue
        kl, found = check() if sound else (math.inf, None)
        worse = 0 if kl < _WORSE * best else worse + 1
        if kl < best and found is not None:
            best, kept = kl, found
        if has_diverged(kl, start) or worse >= _PATIENCE:
            note(diverging(clock, schedule.what, kl))
            break
    return best, kept
