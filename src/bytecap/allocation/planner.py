"""The default method: waterfilled grids for matrices, uniform steps for vectors, one slope for everything.

Every unit has one number to choose, its step `c`. At high rate equal slopes mean equal steps in the Fisher
metric, so steps are written `c_l = c0 * multiplier_l`; multipliers come from correction factors and from measured
rate-distortion points, `c0` from the cap. `Planner` holds the prepared units. It is a value: settling takes steps and
rules (tables and offsets, `bytecap.quantization.rules.Rules`) and returns a `State`, which names the rules to go on
from. `bytecap.methods.rate_control` then meets the cap on real bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from bytecap.allocation.decoded import coder_of, decode_coded, on_base
from bytecap.allocation.secant import next_log_step
from bytecap.allocation.vector_unit import FloatArray, VectorUnit
from bytecap.format.coders import Shared
from bytecap.format.coders.base import CODER as BASE
from bytecap.format.coders.classes import UNIT_CLASS
from bytecap.format.coders.grid import choose_class
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.coders.vector import CODER as VECTOR
from bytecap.format.entropy.shared_tables import Counts, fit_shared, sum_counts
from bytecap.job import Section
from bytecap.quantization import Shrink
from bytecap.quantization.options import Options
from bytecap.quantization.quantizer import Coded, Prepared, rate, round_units
from bytecap.quantization.rules import Rules
from bytecap.quantization.trial_values import values_there
from bytecap.sizes import in_groups
from bytecap.system.ranks import ALONE, Ranks, owners
from bytecap.system.threads import in_threads
from bytecap.types import Curve, Point

_Found = TypeVar("_Found")
Rounding = tuple[dict[str, Coded], npt.NDArray[np.float64]]  # units by name, and centroid statistics
_TOGETHER = 2**24  # weights coded together for each thread
_NEAR, _OFF = 0.02, 0.015  # of the bytes: where a search of a sample ends, and what may be left on the whole
PER_E = 1.2 / 8  # bytes that a weight takes less at a step larger by a factor of e


def finest_step(item: Prepared) -> float:
    """Return the step, above 0, below which symbols would exceed 16 bits; finer grids gain nothing."""
    row_step, largest = torch.exp2(item.row_step.float() / 4), torch.zeros(item.shape[1], device=item.device)
    for part, weight in item.slabs():
        torch.maximum(largest, (weight.abs() / row_step[part, None]).amax(0), out=largest)
    widest = float((largest[item.order] * item.lower.diagonal()).max())
    return max(widest, 1e-20) * 2.0**-15  # of a matrix of zeros


@dataclass(frozen=True)
class State:
    """A settled plan: everything that would be stored, under one set of tables.

    Attributes:
        steps: of every unit.
        coded: matrices as they would be stored, while somebody needs them.
        rules: its tables and offsets, and the rounding that the next settling starts from.
        rates: estimated bytes of every unit.
        distortions: predicted nats per token of every unit.
        origin: rules it was rounded under.
        sections: its units as they are stored, where they have been coded already.
    """

    steps: Mapping[str, float]
    coded: Mapping[str, Coded]
    rules: Rules
    rates: Mapping[str, float]
    distortions: Mapping[str, float]
    origin: Rules | None = None
    sections: Mapping[str, Section] | None = None

    def holding(self, names: Collection[str]) -> State:
        """Return the state with the integers of these matrices only, so that the memory of the others can be freed."""
        return replace(self, coded={n: c for n, c in self.coded.items() if n in names})

    @property
    def shared(self) -> Shared:
        """Return the tables and offsets that the plan is stored and decoded with."""
        return self.rules.shared

    @property
    def rate(self) -> float:
        """Return the estimated bytes of all units."""
        return sum(self.rates.values())

    @property
    def distortion(self) -> float:
        """Return the predicted distortion of all units, in nats per token."""
        return sum(self.distortions.values())


def _whole(found: _Found) -> _Found:
    return found


@dataclass(frozen=True)
class Planner:
    """Prepared units, ready to be settled at any steps under any rules.

    Attributes:
        matrices: units with input statistics.
        vectors: units without.
        options: of the coder.
        finest: by matrix, the step below which nothing is gained; kept where targets change.
        keep: given every rounded unit, returns what states hold of it (`bytecap.quantization.stored`).
        keep_section: given every coded section, returns what is held of it.
        sample: over a sample of rows, where that is what searches and curves are made on.
        ranks: processes that share the rounding and coding.
    """

    matrices: Sequence[Prepared]
    vectors: Sequence[VectorUnit]
    options: Options
    finest: Mapping[str, float]
    keep: Callable[[Coded], Coded] = _whole
    keep_section: Callable[[Section], Section] = _whole
    sample: Planner | None = None
    ranks: Ranks = ALONE

    @staticmethod
    def of(
        matrices: Sequence[Prepared],
        vectors: Sequence[VectorUnit],
        options: Options,
        finest: Mapping[str, float] | None = None,
        ranks: Ranks = ALONE,
    ) -> Planner:
        """Make a planner over prepared units, whose finest steps may be known already."""
        steps = finest or {p.unit.name: finest_step(p) for p in matrices}
        return Planner(matrices, vectors, options, steps, ranks=ranks)

    @property
    def names(self) -> list[str]:
        """Return the names of all units, matrices first."""
        return [p.unit.name for p in self.matrices] + [v.unit.name for v in self.vectors]

    @property
    def parameters(self) -> int:
        """Return the number of values in matrices."""
        return sum(p.unit.parameters for p in self.matrices)

    def emptied(self) -> Planner:
        """Return the planner without the arrays that only rounding needs; decoding still works."""
        return replace(self, matrices=[p.emptied() for p in self.matrices], sample=None)

    def settle(self, steps: Mapping[str, float], rules: Rules, *, refit: bool = True) -> State:
        """Round every unit at its step; with `refit`, then fit tables and offsets to the integers and price by them.

        Args:
            steps: of every unit.
            rules: to round by, and tables to start from: those of a state before, or `initial_rules`.
            refit: False keeps tables and offsets.
        """
        steps = {n: max(s, self.finest.get(n, 0.0)) for n, s in steps.items()}
        coded, centres = self._rounded(self.matrices, steps, rules)
        coded = {p.unit.name: p.scaled(coded[p.unit.name]) for p in self.matrices}
        found = rules
        if refit:
            old, shrinking = rules.shared, self.options.shrink
            sides = self._side_counts(coded, steps, old)
            counts = sum_counts(chain([sides], (c.counts.sum(0) for c in coded.values())))
            shared = fit_shared(counts, centres, Shared(old.tables, old.offset) if shrinking else None)
            found = Rules(shared, Shrink(shared.offset) if shrinking else rules.shrink)
        return self._agreed(replace(self.price(coded, steps, found), origin=rules))

    def _agreed(self, state: State) -> State:
        """Return a state that all ranks have: whoever computes otherwise would plan otherwise."""
        self.ranks.agree({"the bytes after a rounding": state.rate})
        return state

    def _rounded(self, items: Sequence[Prepared], steps: Mapping[str, float], rules: Rules) -> Rounding:
        return round_units(
            items, steps, rules.shrink, self.options, keep=self.keep, ranks=self.ranks, shared=rules.shared
        )

    def finest_state(self, rules: Rules) -> State:
        """Settle all units at the finest steps whose integers still fit 16 bits."""
        return self.settle(dict.fromkeys(self.names, 0.0), rules)

    def round(self, items: Sequence[Prepared], steps: Mapping[str, float], rules: Rules) -> dict[str, Coded]:
        """Round units at their steps, with overlays where they have one; returns them by name."""
        coded, _ = self._rounded(items, steps, rules)
        return {p.unit.name: p.complete(coded[p.unit.name], rules.shared) for p in items}

    def price(self, coded: Mapping[str, Coded], steps: Mapping[str, float], rules: Rules) -> State:
        """Price rounded units in bytes and nats per token; overlays are fitted to them first."""
        whole = {p.unit.name: p.complete(coded[p.unit.name], rules.shared) for p in self.matrices}
        return self._priced(whole, steps, rules)

    def settled(self, coded: Mapping[str, Coded], steps: Mapping[str, float], rules: Rules) -> State:
        """Return the state of units that `round` has rounded under the rules that they are to be stored under."""
        in_order = {p.unit.name: coded[p.unit.name] for p in self.matrices}
        return self._agreed(replace(self._priced(in_order, steps, rules), origin=rules))

    def _priced(self, coded: Mapping[str, Coded], steps: Mapping[str, float], rules: Rules) -> State:
        shared = rules.shared
        rates = {n: rate(c, shared) for n, c in coded.items()}
        distortions = {n: c.distortion for n, c in coded.items()}
        for v in self.vectors:
            rates[v.unit.name] = v.rate(steps[v.unit.name], shared)
            distortions[v.unit.name] = v.distortion(steps[v.unit.name])
        return State(dict(steps), coded, rules, rates, distortions)

    def _side_counts(self, coded: Mapping[str, Coded], steps: Mapping[str, float], shared: Shared) -> Counts:
        """Return the histogram of side information and vectors by the class they would use now, (64, 1025)."""
        counts = sum_counts([])
        for c in coded.values():
            for array in c.code.side_arrays():
                base, cls, _ = choose_class(array, shared.tables)
                if cls:
                    np.add.at(counts[cls], np.minimum(np.abs(array - base), 1024), 1)
        for v in self.vectors:
            _, symbols = VECTOR.quantize(v.values, v.step(steps[v.unit.name]))
            cls, _ = VECTOR.best_class(symbols, shared)
            if cls:
                np.add.at(counts[cls], np.minimum(np.abs(symbols), 1024), 1)
        if not counts.any():
            counts[UNIT_CLASS, :2] = 1
        return counts

    def first_step(self, capacity: float) -> float:
        """Return a first guess of `c0` from Gaussian high-rate theory; `capacity` is in bytes."""
        bits = max(0.0, 8 * capacity / max(1, self.parameters))  # below: less than nothing is left beside fixed units
        logs = []
        for p in self.matrices:
            diag = p.lower.diagonal().double()
            rows = p.shape[0]
            square = torch.stack([w.double().square().mean() * (len(w) / rows) for _, w in p.slabs()]).sum()
            spread = float(square.clamp(min=1e-30).sqrt())
            logs.append((p.unit.parameters, float(diag.log2().mean()) + math.log2(spread)))
        mean = sum(n * x for n, x in logs) / max(1, self.parameters)
        return float(2 ** (mean + 2.05 - bits))

    def search(
        self,
        multipliers: Mapping[str, float],
        capacity: float,
        rules: Rules,
        *,
        start: float,
        rounds: int = 8,
        tolerance: float = 5e-4,
        exact: bool = False,
    ) -> tuple[float, State]:
        """Search the `c0` whose estimated bytes meet `capacity`; tables are refitted on the way, starting from `rules`.

        Args:
            multipliers: of every unit's step.
            capacity: bytes.
            rules: to start from.
            start: a guess of `c0`.
            rounds: of rounding, at most, where one fits.
            tolerance: of the bytes.
            exact: round everything even where there is a sample, which may be 1.5% off; `tolerance` is for this.

        Returns:
            c0 and the settled state.
        """
        if self.sample is not None and not exact:
            c, state = self.sample.search(multipliers, capacity, rules, start=start, rounds=rounds, tolerance=_NEAR)
            c *= math.exp(min(0.1, max(-0.1, (state.rate - capacity) / (PER_E * self.parameters + 1))))
            state = self.settle({n: c * multipliers[n] for n in self.names}, state.rules)
            if abs(state.rate - capacity) <= _OFF * capacity:
                return c, state
            start, rules, rounds = c * math.exp((state.rate / capacity - 1) / 1.2), state.rules, 2
        c, seen = start, []
        widest = 2.0**20 * max(self.finest.values(), default=1.0)  # nothing is left of any weight
        state = State({}, {}, rules, {}, {})
        for i in range(1, 4 * rounds + 1):
            del state  # the next one takes its place in memory
            state = self.settle({n: c * multipliers[n] for n in self.names}, rules)
            rules = state.rules
            seen.append((math.log(c), state.rate))
            fitting = [x for x, rate in seen if rate <= capacity]
            if (i > 1 or tolerance >= _NEAR) and abs(state.rate - capacity) <= tolerance * capacity:
                break
            # some more rounds where nothing fits: beside a unit far more sensitive than all others rates hardly move
            if i % rounds == 0 and (fitting or c == widest or i == 4 * rounds):
                break
            c = min(math.exp(next_log_step(seen, capacity, self.parameters)), widest)
        if state.rate > 1.02 * capacity and fitting:  # not found in time: the finest that fitted
            c = math.exp(min(fitting))
            state = self.settle({n: c * multipliers[n] for n in self.names}, rules)
        return c, state

    def ladder(self, centre: State, offsets: Sequence[float]) -> list[Curve]:
        """Measure the curve of every unit at its step times `2^offset`, under the rules of the state.

        Args:
            centre: where the curves are measured.
            offsets: octaves, 0 excluded.
        """
        points = {n: [Point(centre.rates[n], centre.distortions[n], 0.0)] for n in self.names}
        on = self.sample or self
        base = centre if on is self else on.settle(centre.steps, centre.rules, refit=False)
        for offset in offsets:
            state = on.settle({n: s * 2**offset for n, s in centre.steps.items()}, centre.rules, refit=False)
            for n in self.names:
                rate_of, cost_of = (
                    _ratio(centre.rates[n], base.rates[n]),
                    _ratio(centre.distortions[n], base.distortions[n]),
                )
                points[n].append(Point(state.rates[n] * rate_of, state.distortions[n] * cost_of, offset))
        return [Curve(n, tuple(sorted(p, key=lambda q: q.rate))) for n, p in points.items()]

    def decode(self, state: State, name: str) -> FloatArray:
        """Decode one unit to float32 values (rows, cols), exactly as a reader does."""
        if name in state.coded:
            return decode_coded(state.coded[name], state.shared)
        return next(v for v in self.vectors if v.unit.name == name).decode(state.steps[name])

    def decode_there(self, state: State, name: str) -> torch.Tensor | None:
        """Decode one unit on the GPU that holds it; None for a unit that is on the processor."""
        coded = state.coded.get(name)
        if coded is None or coded.overlay is not None or coded.below is not None:
            return None
        device = next(p.device for p in self.matrices if p.unit.name == name)
        return values_there(coded.code, state.shared.offset, device) if _elsewhere(device) else None

    def encode(self, state: State, names: Sequence[str] | None = None) -> dict[str, tuple[int, bytes]]:
        """Encode units, all by default; returns (tag, section) by name."""
        vectors = {v.unit.name: v for v in self.vectors}

        def one(name: str) -> tuple[int, bytes]:
            if name not in state.coded:
                v, c = vectors[name], state.steps[name]
                if v.as_in_base(c):
                    return BASE.tag, b""
                plain = VECTOR.tag, VECTOR.encode(v.values, v.step(c), state.shared).data
                return plain if v.below is None else on_base(plain)
            coded = state.coded[name]
            if coded.as_in_base:
                return BASE.tag, b""
            base = coder_of(coded.code).tag, coder_of(coded.code).encode(coded.code, state.shared).data
            overlays = [coded.overlay] if coded.overlay else []
            if coded.below is not None:
                return on_base(base, *overlays)
            return (STACK.tag, STACK.encode(base, overlays)) if overlays else base

        wanted = list(self.names if names is None else names)
        sizes = {p.unit.name: p.unit.parameters for p in self.matrices}
        order = sorted(wanted, key=lambda n: -sizes.get(n, 0))  # the largest last would be waited for alone
        tables = state.shared.tables
        _ = (tables.split if self.options.trellis else tables).coding  # once, before all threads ask for it
        found = dict(zip(order, in_threads(one, order), strict=True))
        return {n: found[n] for n in wanted}

    def sections(self, state: State) -> dict[str, Section]:
        """All units as they are stored; some are coded at a time, each by the rank that has its integers."""
        if state.sections is not None:
            return {n: state.sections[n] for n in self.names}
        sizes = {p.unit.name: p.unit.parameters for p in self.matrices}
        spread = owners([sizes.get(n, 1) for n in self.names], self.ranks.size)
        apart = {n: c.owner for n, c in state.coded.items() if c.owner is not None}
        owner = {n: apart.get(n, rank) for n, rank in zip(self.names, spread, strict=True)}
        found: dict[str, Section] = {}
        most = _TOGETHER * max(2, torch.get_num_threads()) * self.ranks.size
        for names in in_groups(self.names, lambda n: sizes.get(n, 0), most):
            own = [n for n in names if owner[n] == self.ranks.rank]
            for part in self.ranks.all([[n, *coded] for n, coded in self.encode(state, own).items()]):
                found |= {n: self.keep_section(Section(tag, data)) for n, tag, data in part}
        return {n: found[n] for n in self.names}


def _elsewhere(device: torch.device) -> bool:
    """Return whether a device is another one than the processor."""
    return device.type != "cpu"


def _ratio(whole: float, sampled: float) -> float:
    """Return the factor from a sample to the whole."""
    return whole / sampled if sampled > 0 else 1.0
