"""Compute the targets of `bytecap.allocation.asymmetric_targets` for a streamed model, block by block.

Passes over the original and over the coded prefix wait side by side in front of every block. One block of each is in
memory; what targets add to weights is kept in work files. Tokens, batches and sums are those of the walk in memory:
rounds of fewer tokens, each behind a coded prefix of its own, cost 6% and 10% of the KL of two models (ADR 18).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bytecap.allocation.asymmetric_targets import Stage, Walked, passes_of, streams_of, tokens_of
from bytecap.allocation.correction import is_rough, unit_values
from bytecap.allocation.pacing import Pace
from bytecap.allocation.planner import Planner, State
from bytecap.allocation.shared_inputs import Inputs, LostError, of_rank, shared_inputs, together
from bytecap.allocation.target_fit import Moments, trial_of
from bytecap.allocation.waiting_passes import WaitingCall
from bytecap.model.chain import Chain, let_go
from bytecap.model.forward import rough_products
from bytecap.model.linears import linear_weights
from bytecap.model.quantized_copy import Values
from bytecap.model.streaming import Pass, Streamed
from bytecap.model.texts import Window
from bytecap.progress import Advance
from bytecap.quantization.quantizer import Prepared
from bytecap.quantization.stored import StoredPrepared
from bytecap.system import allocator
from bytecap.system.ranks import ALONE, Ranks
from bytecap.system.scratch import KeptTensor, Scratch

_Found = TypeVar("_Found")


@torch.no_grad()
def streamed_targets(
    planner: Planner,
    order: Sequence[Sequence[str]],
    state: State,
    pace: Pace,
    original: Streamed,
    quantized_copy: Streamed,
    windows: Sequence[Window],
    *,
    strength: float,
    scratch: Scratch,
    advance: Advance,
    held: Collection[str] | None = None,
) -> Walked[KeptTensor]:
    """Find targets, and code all units that get one; see `drift_targets`.

    Args:
        planner: prepared units.
        order: units that get targets, stage by stage.
        state: rules to code the prefix with, and the integers of all units that are not in `order`.
        pace: rounds units, at steps of its own.
        original: untouched model.
        quantized_copy: a copy of it, given the values of the units that are not in `order`.
        windows: calibration windows.
        strength: at most; 1 is the least-squares target, 0 the weight itself.
        scratch: for what is found.
        advance: called with the share of the work that is done.
        held: units whose targets somebody asks for later; all by default. Those of an 8B take 32 GB.

    Raises:
        LostError: a pass did not call its modules in that order.
    """
    if not order:
        return Walked({}, {})
    staged = {n for names in order for n in names}
    quantized_copy.load(unit_values(planner, state, [n for n in planner.names if n not in staged]))
    work = _Targets(planner, state, pace, strength, scratch, staged if held is None else held)
    data = list(passes_of(windows, tokens_of(planner, original.device, windows), str(original.device)))
    lanes, ranks = (original, quantized_copy), planner.ranks
    walk = _Walk(lanes, of_rank(data, ranks), order, ranks, scratch, rough=is_rough(planner, state))
    _through(walk, work.stage, [mask for _, mask in data], advance)
    return work.found


@torch.no_grad()
def walk_streamed(
    order: Sequence[Sequence[str]], original: Streamed, quantized_copy: Streamed, windows: Sequence[Window],
    stage: Stage, *, tokens: int, scratch: Scratch, advance: Advance,
) -> None:  # fmt: skip
    """Walk two streamed models as `walk_stages` does two in memory, told what residual streams lack.

    Args:
        order: unit names, stage by stage in calling order.
        original: untouched model.
        quantized_copy: a copy of it that holds the values of units that are in no stage; it holds none afterwards.
        windows: to walk.
        stage: called for every one, see `Stage`.
        tokens: of a batch.
        scratch: for what waits.
        advance: called with the share of the work that is done.

    Raises:
        LostError: a pass did not call its modules in this order.
    """
    data = list(passes_of(windows, tokens, str(original.device)))
    walk = _Walk((original, quantized_copy), data, order, ALONE, scratch, rough=False, streams=True)
    _through(walk, lambda names, found: stage(names, found, 0, 1), [mask for _, mask in data], advance)


def _through(
    walk: _Walk, stage: Callable[[Sequence[str], Moments], Values], masks: Sequence[Tensor | None], advance: Advance
) -> None:
    """Go through all stages, and give the second model what is made of each."""
    try:
        for names in walk.stages():
            walk.put(stage(names, walk.moments(names, masks)))
            allocator.release()
            advance(1 / walk.count)
    finally:
        walk.cancel()
        walk.lanes[1].replaced.clear()  # whose makers hold the units, and a copy and its module hold one another


class _Targets:
    """Targets as they are found."""

    def __init__(
        self, planner: Planner, state: State, pace: Pace, strength: float, scratch: Scratch, held: Collection[str]
    ) -> None:
        self._planner, self._state, self._pace, self._strength, self._scratch = planner, state, pace, strength, scratch
        self._held = held
        self._units = {p.unit.name: p for p in planner.matrices}
        self.found = Walked[KeptTensor]({}, {})

    def stage(self, names: Sequence[str], found: Moments) -> Values:
        """Aim the units of one stage, and code them for the passes that go on; returns their values."""
        units = [self._units[n] for n in names]
        fix, granted, _ = found.fit([trial_of(p) for p in units], self._strength)
        fix *= granted
        members: list[Prepared] = []
        for n, item in zip(names, units, strict=True):
            change = self._scratch.put(item.times(fix))
            members.append(moved(item, change))
            if n in self._held:
                self.found.change[n] = change
        del fix
        coded = self._pace.round(self._planner, members)
        self.found.coded.update(coded)
        return unit_values(self._planner, replace(self._state, coded=coded), names)


def moved(item: Prepared, change: KeptTensor | Tensor) -> Prepared:
    """Return a unit with a change of its target, which a unit in work files reads when it is needed."""
    if isinstance(item, StoredPrepared):
        return item.moved(change)
    return item.moved(change.load(item.device) if isinstance(change, KeptTensor) else change)


def all_moved(planner: Planner, change: dict[str, Any]) -> Planner:
    """Return the units with what targets add to them, which is used up."""
    matrices = [moved(p, change.pop(n)) if (n := p.unit.name) in change else p for p in planner.matrices]
    return replace(planner, matrices=matrices)


class _Held:
    """A call that waits, with what goes into its block in a work file meanwhile, if nobody else reads that.

    Args:
        call: a call of a block, or of a module outside the chain.
        chain: the chain of the block; None for other modules.
        scratch: for the file; None where somebody else may read the tensor.
    """

    def __init__(self, call: WaitingCall, chain: Chain | None, scratch: Scratch | None) -> None:
        self._call, self._kept = call, None
        if chain is not None and scratch is not None:
            self._handed = chain.taken(call.args, call.kwargs)
            self._kept = scratch.put(self._handed)
            let_go(self._handed)

    def restore(self) -> None:
        """Bring the tensor back, for the pass to go on."""
        if self._kept is not None:
            self._handed.data = self._kept.load(self._handed.device)

    def look(self, work: Callable[[WaitingCall], _Found]) -> _Found:
        """Return what is made of the call while the tensor is there."""
        self.restore()
        found = work(self._call)
        if self._kept is not None:
            let_go(self._handed)
        return found

    def inputs_of(self, inner: nn.Module, chain: Chain, stream: str | None) -> list[Tensor]:
        """See `WaitingCall.inputs_of`."""
        return self.look(lambda call: [x.detach() for x in call.inputs_of(inner, chain, stream)])


class _Walk:
    """Passes of two models that wait in front of blocks, with one block of each in memory.

    A stage inside a block is reached by running the block up to there, once for every stage; one outside by going on.
    """

    def __init__(
        self,
        lanes: Sequence[Streamed],
        data: Sequence[Any],
        order: Sequence[Sequence[str]],
        ranks: Ranks,
        scratch: Scratch,
        *,
        rough: bool,
        streams: bool = False,
    ) -> None:
        self.lanes, self.count = lanes, len(order)
        self._order, self._ranks, self._rough = order, ranks, rough
        self._chain, self._streams, self._written = lanes[0].chain, streams, dict[str, str]()
        self._maps = [linear_weights(x.module) for x in lanes]
        outside = [names[0] for names in order if not self._chain.holds(names[0])]
        self._passes = [
            [Pass(x, run, [maps[n][0] for n in outside]) for run, _ in data]
            for x, maps in zip(lanes, self._maps, strict=True)
        ]
        self._scratch = scratch if lanes[0].alone else None
        self._calls: list[list[_Held]] = []  # of both models, by pass

    def stages(self) -> Iterator[Sequence[str]]:
        """Yield every stage's units while the passes wait in front of it, or of its block."""
        chain, number = self._chain, 0
        for part in (None, *range(chain.count), chain.count):
            prefix = f"{chain.path}.{part}."
            with self._loaded(None if part == chain.count else part):
                self._written = self._find_streams(prefix) if self._streams else {}
                while number < len(self._order):
                    first = self._order[number][0]
                    inside = first.startswith(prefix) if part not in {None, chain.count} else not chain.holds(first)
                    if not inside or (part is None and not self._before_chain(number)):
                        break
                    if not chain.holds(first):
                        self._advance(first)
                    yield self._order[number]
                    number += 1
                if part != chain.count:
                    self._advance(None)

    def _find_streams(self, prefix: str) -> dict[str, str]:
        """Return where the streams are that units of the block write to, in front of which the passes wait."""
        there = [names for names in self._order if names[0].startswith(prefix)]
        if not there:
            return {}

        def find(call: WaitingCall | None) -> dict[str, str]:
            return streams_of(call, self._maps[0], there, self._chain, self._ranks)

        with rough_products(self.lanes[0].device, wanted=self._rough):
            return self._calls[0][0].look(find) if self._calls else find(None)

    def _before_chain(self, number: int) -> bool:
        """Whether a stage outside the chain is called in front of it."""
        return any(self._chain.holds(names[0]) for names in self._order[number:])

    @contextmanager
    def _loaded(self, block: int | None) -> Iterator[None]:
        cache: dict[Any, Tensor] = {}
        with ExitStack() as stack:
            for lane in self.lanes:
                stack.enter_context(lane.outside(cache) if block is None else lane.block(block, cache))
            yield

    def _advance(self, first: str | None) -> None:
        """Let all passes go on to the stage of this unit, outside the chain, or in front of the next block."""
        together(self._ranks, partial(self._go, first))

    def _go(self, first: str | None) -> None:
        stops = [
            x.blocks if first is None else [maps[first][0]] for x, maps in zip(self.lanes, self._maps, strict=True)
        ]
        before, self._calls = self._calls[::-1], []
        with rough_products(self.lanes[0].device, wanted=self._rough):
            for group in zip(*self._passes, strict=True):
                for held in before.pop() if before else ():
                    held.restore()
                found = [p.advance() for p in group]
                if any(p.at not in there for p, there in zip(group, stops, strict=True)):
                    raise LostError
                if isinstance(found[0], tuple):  # not behind the last block
                    handed = self._chain if first is None else None
                    self._calls.append([
                        _Held(WaitingCall(p.at, *f), handed, self._scratch)
                        for p, f in zip(group, found, strict=True) if p.at is not None
                    ])  # fmt: skip

    def moments(self, names: Sequence[str], masks: Sequence[Tensor | None]) -> Moments:
        """Return the moments of what the stage is given by both models, in all passes."""
        found, device, stream = Moments(), self.lanes[0].device, self._written.get(names[0])
        begun, width = partial(self._inputs, names[0], stream), 2 + (stream is not None)
        with rough_products(device, wanted=self._rough):
            given = shared_inputs(self._ranks, begun, len(masks), str(device), width)
            for (x, seen, *lack), mask in zip(given, masks, strict=True):
                found.add(x, seen, mask, *lack)
        return found

    def _inputs(self, first: str, stream: str | None) -> Iterator[Inputs]:
        """Yield the inputs of a unit's module in both models, and what the stream behind it lacks, pass by pass."""
        maps = [there[first][0] for there in self._maps]
        for pair in self._calls:
            found = (held.inputs_of(m, self._chain, stream) for held, m in zip(pair, maps, strict=True))
            (x, *whole), (seen, *coded) = found
            yield (x, seen, *(a - b for a, b in zip(whole, coded, strict=True)))

    def put(self, values: Values) -> None:
        """Let the second model hold these values."""
        lane = self.lanes[1]
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
