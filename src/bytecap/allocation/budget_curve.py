"""Describe a plan's margin: plans at neighbouring budgets, and the units that a kilobyte more or less changes.

Solved on the curves the plan was made from, so it costs next to nothing and says what the allocator believes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bytecap.allocation.allocate import allocate, floor_rate
from bytecap.types import Curve, Plan

SHARES = (-0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2)
KILOBYTE = 1000.0


def margin(curves: Sequence[Curve], plan: Plan, capacity: float) -> dict[str, Any]:
    """Return the margin of a plan.

    Args:
        curves: that the plan was made from.
        plan: at `capacity`.
        capacity: bytes of the units.

    Returns:
        `slope_nats_per_byte`; `line`, plans at other budgets (`bytes` more than this one, `nats` per token); `next` and
        `last`: units that 1000 bytes more, or the last 1000, go to, with their `bytes` and `nats` (negative: better).
    """
    floor = floor_rate(curves)
    top = sum(max(p.rate for p in c.points) for c in curves)
    line = []
    for share in SHARES:
        size = capacity * (1 + share)
        if share == 0 or floor < size < top:
            found = plan if share == 0 else allocate(curves, size)
            line.append({"bytes": share * capacity, "nats": found.distortion})
    more = allocate(curves, capacity + KILOBYTE)
    less = allocate(curves, capacity - KILOBYTE) if capacity - KILOBYTE > floor else plan
    return {
        "slope_nats_per_byte": plan.slope, "line": line, "next": _moves(plan, more), "last": _moves(less, plan),
    }  # fmt: skip


def _moves(before: Plan, after: Plan) -> list[dict[str, Any]]:
    """Return the units whose points differ, largest change first."""
    found = [
        {"unit": n, "bytes": p.rate - before.choice[n].rate, "nats": p.distortion - before.choice[n].distortion}
        for n, p in after.choice.items() if p != before.choice[n]
    ]  # fmt: skip
    return sorted(found, key=lambda m: -abs(m["bytes"]))
