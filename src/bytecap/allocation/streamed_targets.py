"""Compute the targets of `bytecap.allocation.asymmetric_targets` for a streamed model, block by block.

Passes over the original and over the coded prefix wait side by side in front of every block and of every stage inside
it. One block of each is in memory; what targets add to weights is kept in work files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bytecap.allocation.asymmetric_targets import ROUND_TOKENS, passes_of, rounds, tokens_of
from bytecap.allocation.correction import is_rough, unit_values
from bytecap.allocation.planner import Planner, State
from bytecap.allocation.shared_inputs import LostError, of_rank, shared_inputs, together
from bytecap.allocation.target_fit import Moments, trial_of
from bytecap.model.forward import rough_products
from bytecap.model.linears import linear_weights
from bytecap.model.quantized_copy import Values
from bytecap.model.streaming import Pass, Streamed
from bytecap.model.texts import Window
from bytecap.progress import Advance
from bytecap.quantization.quantizer import Prepared
from bytecap.quantization.stored import StoredPrepared
from bytecap.system import allocator
from bytecap.system.ranks import Ranks
from bytecap.system.scratch import KeptTensor, Scratch
from bytecap.system.slabs import slabs


@torch.no_grad()
def streamed_targets(
    planner: Planner,
    order: Sequence[Sequence[str]],
    state: State,
    original: Streamed,
    quantized_copy: Streamed,
    windows: Sequence[Window],
    *,
    strength: float,
    scratch: Scratch,
    advance: Advance,
) -> dict[str, KeptTensor]:
    """Return the changes of units' targets, (rows, cols) by unit name; see `drift_targets`.

    Args:
        planner: prepared units.
        order: units that get targets, stage by stage.
        state: steps and rules to code the prefix with, and the integers of all units that are not in `order`.
        original: untouched model.
        quantized_copy: a copy of it, given the values of the units that are not in `order`.
        windows: calibration windows.
        strength: at most; 1 is the least-squares target, 0 the weight itself.
        scratch: for what is found.
        advance: called with the share of the work that is done.

    Raises:
        LostError: a pass did not call its modules in that order.
    """
    if not order:
        return {}
    staged = {n for names in order for n in names}
    quantized_copy.load(unit_values(planner, state, [n for n in planner.names if n not in staged]))
    work = _Targets(planner, state, strength, scratch)
    tokens = tokens_of(planner, original.device, windows)
    groups = rounds(windows, ROUND_TOKENS[original.device.type])
    for chosen in groups:
        data = list(passes_of(chosen, tokens, str(original.device)))
        walk = _Walk([original, quantized_copy], of_rank(data, planner.ranks), order, planner.ranks)
        try:
            for names in walk.stages():
                work.stage(walk, names, [mask for _, mask in data])
                advance(1 / len(order) / len(groups))
        finally:
            walk.cancel()
        work.rounds += 1
    return work.change


class _Targets:
    """Targets as they are found, round by round."""

    def __init__(self, planner: Planner, state: State, strength: float, scratch: Scratch) -> None:
        self._planner, self._state, self._strength, self._scratch = planner, state, strength, scratch
        self._units = {p.unit.name: p for p in planner.matrices}
        self.change: dict[str, KeptTensor] = {}
        self.rounds = 0

    def stage(self, walk: _Walk, names: Sequence[str], masks: Sequence[Tensor | None]) -> None:
        """Aim the units of one stage, and code them for the passes that go on."""
        found, device = Moments(), str(self._units[names[0]].device)
        with rough_products(device, wanted=is_rough(self._planner, self._state)):
            pairs = shared_inputs(self._planner.ranks, walk.inputs, len(masks), device)
            for (x, seen), mask in zip(pairs, masks, strict=True):
                found.add(x, seen, mask)
        fix, granted, _ = found.fit([trial_of(self._units[n]) for n in names], self._strength)
        fix *= granted
        del found, pairs
        members: list[Prepared] = []
        for n in names:
            item = self._units[n]
            fresh = item.times(fix)
            if n in self.change:
                for part in slabs(*item.shape):
                    before = self.change[n].load(fresh.device, part).clone()
                    fresh[part] = before.lerp_(fresh[part], 1 / (self.rounds + 1))
            self.change[n] = self._scratch.put(fresh)
            del fresh
            members.append(moved(item, self.change[n]))
        coded = self._planner.round(members, self._state.steps, self._state.rules)
        walk.put(unit_values(self._planner, replace(self._state, coded=coded), names))
        allocator.release()


def moved(item: Prepared, change: KeptTensor) -> Prepared:
    """Return a unit with a change of its target, which a unit in work files reads when it is needed."""
    if isinstance(item, StoredPrepared):
        return item.moved(change)
    return item.moved(change.load(item.device))


class _Walk:
    """Passes of two models that stop at every stage, with one block of each in memory."""

    def __init__(
        self, lanes: Sequence[Streamed], data: Sequence[Any], order: Sequence[Sequence[str]], ranks: Ranks
    ) -> None:
        self._lanes, self._order, self._ranks = lanes, order, ranks
        self._stops = [[linear_weights(x.module)[names[0]][0] for names in order] for x in lanes]
        self._passes = [
            [Pass(x, run, stops) for run, _ in data] for x, stops in zip(lanes, self._stops, strict=True)
        ]  # fmt: skip
        self._found: list[list[Any]] = []

    def stages(self) -> Iterator[Sequence[str]]:
        """Yield every stage's units while the passes wait in front of it."""
        chain, number = self._lanes[0].chain, 0
        for part in (None, *range(chain.count), chain.count):
            prefix = f"{chain.path}.{part}."
            with self._loaded(None if part == chain.count else part):
                while number < len(self._order):
                    first = self._order[number][0]
                    inside = first.startswith(prefix) if part not in {None, chain.count} else not chain.holds(first)
                    if not inside or (part is None and not self._before_chain(number)):
                        break
                    self._advance(number)
                    yield self._order[number]
                    number += 1
                if part != chain.count:
                    self._advance(None)

    def _before_chain(self, number: int) -> bool:
        """Whether a stage outside the chain is called in front of it."""
        chain = self._lanes[0].chain
        return any(chain.holds(names[0]) for names in self._order[number:])

    @contextmanager
    def _loaded(self, block: int | None) -> Iterator[None]:
        cache: dict[Any, Tensor] = {}
        with ExitStack() as stack:
            for lane in self._lanes:
                stack.enter_context(lane.outside(cache) if block is None else lane.block(block, cache))
            yield

    def _advance(self, number: int | None) -> None:
        """Let all passes go on to a stage, or to the next block."""
        together(self._ranks, partial(self._go, number))

    def _go(self, number: int | None) -> None:
        self._found = [[p.advance() for p in group] for group in self._passes]
        for stops, group in zip(self._stops, self._passes, strict=True):
            if any((p.at is not stops[number]) if number is not None else p.at in stops for p in group):
                raise LostError

    def inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the stage is given by both models, batch by batch."""
        for one, other in zip(*self._found, strict=True):
            yield one[0][0], other[0][0]
        self._found = []

    def put(self, values: Values) -> None:
        """Let the second model hold these values."""
        lane = self._lanes[1]
        for name in values:
            found, place = torch.as_tensor(values[name]).to(lane.device, lane.dtype), lane.module.get_parameter(name)
            if place.is_meta:  # outside the chain, and not called yet
                lane.load({name: found})
            else:
                place.data = found

    def cancel(self) -> None:
        """Leave the passes."""
        for p in (p for group in self._passes for p in group):
            p.cancel()
