"""Meet a capacity while units are rounded one after the other, so that a large model is not rounded for it beforehand.

A plan that was rounded whole says what every unit takes, and misses the capacity by a percent or two. The rest is
made up for along the walk for targets: what was rounded so far says by how much bytes differ from those of the plan,
and the steps of what is left move by as much as that calls for. That is less than a hundredth of an octave on most
models, and near the plan's slope bytes are worth the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from bytecap.allocation.planner import PER_E, Planner, State
from bytecap.quantization.quantizer import Coded, Prepared, rate

_MOST = 0.1  # of a unit's log-step: more would spend its bytes off the plan's slope
_SURE = 0.02  # of the bytes: how much has to be rounded for its growth to count half


class Pace:
    """Rounds the units of a walk, stage by stage.

    Args:
        planner: the units.
        state: steps, rules, and the bytes that every unit is expected to take.
        staged: units that are rounded on the walk.
        capacity: bytes that all units are to take; None leaves steps as they are.
        follow: given the units of every stage as soon as they are rounded.

    Attributes:
        steps: that units were rounded at, or are going to be.
    """

    def __init__(
        self,
        planner: Planner,
        state: State,
        staged: Collection[str],
        capacity: float | None = None,
        follow: Callable[[Mapping[str, Coded]], None] = lambda _: None,
    ) -> None:
        self.steps = dict(state.steps)
        self._state, self._capacity, self._follow = state, capacity, follow
        self._parameters = {p.unit.name: p.unit.parameters for p in planner.matrices if p.unit.name in staged}
        self._least = planner.finest
        self._found: dict[str, float] = {}  # bytes of the units that were rounded

    def round(self, planner: Planner, stage: Sequence[Prepared]) -> dict[str, Coded]:
        """Round the units of one stage, as they are now."""
        names, state = [p.unit.name for p in stage], self._state
        if self._capacity is not None:
            if any(n in self._found for n in names):  # a walk begins anew
                self._found = {}
            change = self._change(self._capacity)
            self.steps |= {n: max(state.steps[n] * math.exp(change), self._least.get(n, 0.0)) for n in names}
        coded = planner.round(stage, self.steps, state.rules)
        if self._capacity is not None:
            self._found |= {n: rate(c, state.shared) for n, c in coded.items()}
        self._follow(coded)
        return coded

    def _change(self, capacity: float) -> float:
        """Return by how much the log-steps of all units that are left should be larger than planned."""
        rates, found = self._state.rates, sum(self._found.values())
        total, left = sum(rates.values()), [n for n in self._parameters if n not in self._found]
        planned = sum(rates[n] - PER_E * self._parameters[n] * self._moved(n) for n in self._found)
        growth = (found - planned) / (planned + _SURE * total)
        room = capacity - found - sum(r for n, r in rates.items() if n not in self._parameters)
        over = (1 + growth) * sum(rates[n] for n in left) - room
        return min(_MOST, max(-_MOST, over / (PER_E * sum(self._parameters[n] for n in left) + 1)))

    def _moved(self, name: str) -> float:
        return math.log(self.steps[name] / self._state.steps[name])
