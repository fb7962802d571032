"""Compute asymmetric targets: aim at the original outputs from the inputs that the coded prefix delivers.

Layers behind coded ones see other inputs `x^` than the original `x`, and get the targets that
`bytecap.allocation.target_fit` finds for both, and, if wanted, for what a residual stream lacks that their output is
added to (`bytecap.allocation.written_streams`). Units are taken in the order the model calls them; modules fed by the
same tensor form a stage, a stage is coded before the next one is treated. Units with several uses (tied, looped, or
read by more than their module) keep their weights: one target cannot serve several inputs. They are coded before all
others, so that the rest aims from what they deliver. Where the order of calls depends on the data there are no targets.

A target makes up for the very errors that the prefix was coded with, which all tokens have to see. So passes over all
of them wait in front of a block (`bytecap.model.chain`), where a pass holds little, and a block's stages are reached by
running it again up to there. A model without a chain of blocks is walked in rounds of fewer tokens, which wait in front
of every stage; its targets are means over the rounds.

Sources: WaterSIC (arXiv:2603.04956) and GPTAQ (arXiv:2504.02692) for the corrected target.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from bytecap.allocation.correction import is_rough, unit_values
from bytecap.allocation.pacing import Pace
from bytecap.allocation.planner import Planner, State
from bytecap.allocation.shared_inputs import Inputs, of_rank, shared_inputs, together
from bytecap.allocation.target_fit import Moments, trial_of
from bytecap.allocation.waiting_passes import Run, WaitingCall, WaitingPass, is_spent
from bytecap.allocation.written_streams import streams_written
from bytecap.model import streaming
from bytecap.model.batches import Batch
from bytecap.model.chain import Chain, find_chain
from bytecap.model.forward import batches, many_tokens, rough_products
from bytecap.model.linears import linear_weights, maps_otherwise, of_transformers
from bytecap.model.quantized_copy import Values, load_values, share_storage
from bytecap.model.texts import Window
from bytecap.model.weight_reads import count_uses
from bytecap.progress import Advance
from bytecap.quantization.quantizer import Coded, Prepared
from bytecap.system import allocator
from bytecap.system.ranks import ALONE, Ranks
from bytecap.types import Unit

_Change = TypeVar("_Change")
Stage = Callable[[Sequence[str], Moments, int, int], Values]
"""Given a stage's units, the moments of their inputs, the rounds before this one and all rounds, returns values."""

_Calls = tuple[WaitingCall, WaitingCall]  # of the original and of its copy
ROUND_TOKENS = {"cpu": 4096, "cuda": 16_384}  # waiting passes hold some 30 kB a token for hidden size 512


@dataclass(frozen=True)
class Walked(Generic[_Change]):
    """The outcome of a walk.

    Attributes:
        change: what targets add to the weights of units, (rows, cols) float32 by unit name.
        coded: the units of all stages as they were coded on the way.
    """

    change: dict[str, _Change]
    coded: dict[str, Coded]


def stages(model: nn.Module, run: Run) -> list[list[str]]:
    """Return the names of linear modules used once, in calling order, grouped where one tensor feeds them."""
    own = of_transformers(model)  # its code reads weights through their modules alone
    order: list[tuple[str, tuple[int, Any]]] = []
    keep: list[Tensor] = []  # inputs stay alive, or their addresses would be used again
    handles = []
    for name, (module, kind) in linear_weights(model).items():
        if kind == "embedding" or (own and maps_otherwise(module)):
            continue  # nothing to aim at where outputs are not those of a plain map

        def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            if not args:  # called by keyword: nowhere to stop
                return
            keep.append(args[0])
            order.append((name, (args[0].data_ptr(), args[0].shape)))

        handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        streaming.run(model, run)
    for handle in handles:
        handle.remove()
    called = [name for name, _ in order]
    if not own:
        called += [name for name, n in count_uses(model, run).items() for _ in range(n - 1)]
    grouped: list[list[str]] = []
    last = None
    for name, key in order:
        if called.count(name) > 1:
            continue
        if grouped and key == last:
            grouped[-1].append(name)
        else:
            grouped.append([name])
        last = key
    return grouped


@torch.no_grad()
def drift_targets(
    planner: Planner,
    order: Sequence[Sequence[str]],
    state: State,
    pace: Pace,
    original: nn.Module,
    quantized_copy: nn.Module,
    windows: Sequence[Window],
    *,
    strength: float,
    device: str,
    advance: Advance,
    held: Collection[str] | None = None,
) -> Walked[Tensor]:
    """Find targets, and code all units that get one.

    Args:
        planner: prepared units.
        order: units that get targets, see `call_order`.
        state: rules to code the prefix with, and the integers of all units that are not in `order`.
        pace: rounds units, at steps of its own.
        original: untouched model.
        quantized_copy: a copy of it that holds quantized values, overwritten.
        windows: calibration windows.
        strength: at most; 1 is the least-squares target, 0 the weight itself.
        device: torch device.
        advance: called with the share of the work that is done.
        held: units whose targets somebody asks for later; all by default. Targets take the memory of the weights, and
            integers a quarter of that.
    """
    units = {p.unit.name: p for p in planner.matrices}
    found = Walked[Tensor]({}, {})
    if not order:
        return found
    staged = {n for names in order for n in names}
    load_values(quantized_copy, unit_values(planner, state, [n for n in planner.names if n not in staged]))

    def stage(names: Sequence[str], inputs: Moments, rounds_before: int, count: int) -> Values:
        members = _aimed([units[n] for n in names], inputs, strength, found.change, rounds_before)
        if held is not None and rounds_before == count - 1:
            for n in set(names).difference(held):
                del found.change[n]
        coded = pace.round(planner, members)
        found.coded.update(coded)
        return unit_values(planner, replace(state, coded=coded), names)

    walk_stages(
        order, original, quantized_copy, windows, stage, tokens=tokens_of(planner, device, windows), device=device,
        advance=advance, ranks=planner.ranks, rough=is_rough(planner, state),
    )  # fmt: skip
    return found


@torch.no_grad()
def walk_stages(
    order: Sequence[Sequence[str]], original: nn.Module, quantized_copy: nn.Module, windows: Sequence[Window],
    stage: Stage, *, tokens: int, device: str, advance: Advance,
    ranks: Ranks = ALONE, streams: bool = False, rough: bool = False, round_tokens: int | None = None,
) -> None:  # fmt: skip
    """Walk both models stage by stage, and load into the copy what is made of every stage.

    Args:
        order: unit names, stage by stage in calling order.
        original: untouched model.
        quantized_copy: a copy of it that holds the values of units that are in no stage.
        windows: to walk.
        stage: called for every one, see `Stage`.
        tokens: of a batch.
        device: torch device.
        advance: called with the share of the work that is done.
        ranks: processes that share the passes.
        streams: units whose output is added to a residual stream are told what that lacks.
        rough: whether passes may be rough, see `rough_products`.
        round_tokens: of a round, where there is no chain of blocks; `ROUND_TOKENS` by default.

    Raises:
        LostError: a pass did not call its modules in this order.
    """
    staged = {n for names in order for n in names}
    chain = _chain_of(original, windows, device)
    spent = None
    if chain and not isinstance(windows[0], Batch):  # whose tensors are the user's own
        spent = chain if is_spent(original, next(passes_of(windows[:1], 1, device))[0], chain) else None
    many = round_tokens or ROUND_TOKENS[torch.device(device).type]
    groups = [list(windows)] if chain else rounds(windows, many)
    for number, chosen in enumerate(groups):
        data = list(passes_of(chosen, tokens, device))
        own = of_rank(data, ranks)
        walks = [_walks(model, own, _points(model, order, chain), spent) for model in (original, quantized_copy)]
        try:
            for _, group in groupby(order, lambda names: _point(names, chain)):
                there = list(group)
                with rough_products(device, wanted=rough):
                    calls = together(ranks, partial(_calls, walks))
                share_storage(quantized_copy, original, staged)  # no pass needs the stages behind it again
                written = {}
                if streams and chain is not None:
                    written = streams_of(calls[0][0] if calls else None, linear_weights(original), there, chain, ranks)
                for names in there:
                    inner = [linear_weights(m)[names[0]][0] for m in (original, quantized_copy)]
                    found, stream = Moments(), written.get(names[0])
                    begun, width = partial(_inputs, calls, inner, chain, stream), 2 + (stream is not None)
                    with rough_products(device, wanted=rough):
                        inputs = shared_inputs(ranks, begun, len(data), device, width)
                        for (x, seen, *lack), (_, mask) in zip(inputs, data, strict=True):
                            found.add(x, seen, mask, *lack)
                    load_values(quantized_copy, stage(names, found, number, len(groups)))
                    del found, inputs
                    allocator.release()
                    advance(1 / len(order) / len(groups))
                del calls
        finally:
            for walk in (w for group in walks for w in group):
                walk.cancel()


def _calls(walks: Sequence[Sequence[WaitingPass]]) -> list[_Calls]:
    """Let all passes go on to their next point."""
    return [(a.advance(), b.advance()) for a, b in zip(*walks, strict=True)]


def _inputs(
    calls: Sequence[_Calls], inner: Sequence[nn.Module], chain: Chain | None, stream: str | None
) -> Iterator[Inputs]:
    """Yield the inputs of a stage's module in both models, and what the stream behind it lacks, pass by pass."""
    for pair in calls:
        (x, *whole), (seen, *coded) = (c.inputs_of(m, chain, stream) for c, m in zip(pair, inner, strict=True))
        yield (x, seen, *(a - b for a, b in zip(whole, coded, strict=True)))


def streams_of(
    call: WaitingCall | None, maps: Mapping[str, tuple[nn.Module, str]], order: Sequence[Sequence[str]], chain: Chain,
    ranks: Ranks,
) -> dict[str, str]:  # fmt: skip
    """Return where the residual streams are that the outputs of a block's units are added to, by unit name.

    Args:
        call: of the block of the original; None on a rank that has no pass.
        maps: the original's linear maps, see `linear_weights`.
        order: units of the block, stage by stage.
        chain: that the block is of.
        ranks: processes that share the passes.
    """
    alone = [names[0] for names in order if len(names) == 1]
    if not alone or not chain.holds(alone[0]):
        return {}
    found = {}
    if call is not None:
        given = chain.taken(call.args, call.kwargs)
        found = streams_written(call.module, given, partial(call.begun, chain), {n: maps[n][0] for n in alone})
    return {n: found.get(n, "") for n in alone if all(ranks.all(n in found or call is None))}


def _aimed(
    items: Sequence[Prepared], found: Moments, strength: float, change: dict[str, Tensor], rounds_before: int
) -> list[Prepared]:
    """Return the units of a stage with their targets, whose changes are means over the rounds so far."""
    fit = found.fit([trial_of(p) for p in items], strength)
    for p in items:
        fresh, n = p.times(fit.fix * fit.strength), p.unit.name
        if fit.stream is not None:
            fresh += fit.stream
        change[n] = change[n].lerp_(fresh, 1 / (rounds_before + 1)) if n in change else fresh
    return [p.moved(change[p.unit.name]) for p in items]


def _chain_of(model: nn.Module, windows: Sequence[Window], device: str) -> Chain | None:
    """Return the blocks that passes can wait in front of, if calls of blocks can be begun more than once."""
    run, _ = next(passes_of(windows[:1], 1, device))
    stateful: list[Any] = []
    chain = find_chain(model, partial(run, model))
    if chain is None:
        return None

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stateful.extend(v for v in (*args, *kwargs.values()) if hasattr(v, "update"))

    handle = chain.blocks(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    run(model)
    handle.remove()
    return None if stateful else chain


def _point(names: Sequence[str], chain: Chain | None) -> str:
    """Return the path of the block that holds a stage, or the stage's first unit."""
    if chain is None or not chain.holds(names[0]):
        return names[0]
    return f"{chain.path}.{names[0][len(chain.path) + 1 :].partition('.')[0]}"


def _points(model: nn.Module, order: Sequence[Sequence[str]], chain: Chain | None) -> list[nn.Module]:
    """Return the modules that passes stop in front of."""
    modules = linear_weights(model)
    paths = [path for path, _ in groupby(order, lambda names: _point(names, chain))]
    return [modules[p][0] if p in modules else model.get_submodule(p) for p in paths]


def tokens_of(planner: Planner, device: torch.device | str, windows: Sequence[Window]) -> int:
    """Return the tokens of a pass, by the largest matrix: the vocabulary's."""
    return many_tokens(max(p.unit.matrix_shape[0] for p in planner.matrices), device, windows)


def passes_of(windows: Sequence[Window], tokens: int, device: str) -> Iterator[tuple[Run, Tensor | None]]:
    """Start passes over batches, each with its mask (batch, length) of real tokens; None where all are real."""
    if isinstance(windows[0], Batch):
        for batch in windows:
            assert isinstance(batch, Batch)  # noqa: S101 (sets hold one kind)
            yield partial(batch.value, device=device), None
        return
    for ids, mask in batches(windows, tokens):
        yield partial(_forward, ids[:, :-1].to(device)), mask.to(device)


def _forward(ids: Tensor, model: nn.Module) -> Any:
    return model(ids)


def call_order(planner: Planner, model: nn.Module, windows: Sequence[Window], device: str) -> list[list[str]]:
    """Return the units that can be given targets, stage by stage in calling order; none if batches disagree on it."""
    return order_of([p.unit for p in planner.matrices], model, windows, device)


def order_of(units: Sequence[Unit], model: nn.Module, windows: Sequence[Window], device: str) -> list[list[str]]:
    """Return the names of those units that can be given targets, see `call_order`."""
    known = {u.name for u in units if not u.aliases}
    order = [[n for n in names if n in known] for names in _stages_of(model, windows, device)]
    return [names for names in order if names]


def _stages_of(model: nn.Module, windows: Sequence[Window], device: str) -> list[list[str]]:
    """Return the stages of a model; none if some batches disagree on them."""
    if of_transformers(model):
        first = next(batches(windows, 1))[0][:1, :8].to(device)
        return stages(model, partial(_forward, first))
    spread = windows[:: max(1, len(windows) // 4)]
    found = [stages(model, run) for run, _ in passes_of(spread, 1, device)]
    return found[0] if all(f == found[0] for f in found) else []


def rounds(windows: Sequence[Window], tokens: int) -> list[list[Window]]:
    """Cut the windows into groups of about so many predicted tokens.

    >>> [len(r) for r in rounds([Window(tuple(range(4097)), 1)] * 5, 8192)]
    [2, 2, 1]
    """
    groups: list[list[Window]] = [[]]
    size = 0
    for w in windows:
        if size >= tokens:
            groups.append([])
            size = 0
        groups[-1].append(w)
        size += w.predicted
    if len(groups) > 1 and size < tokens // 2:  # too few for targets of their own
        groups[-2] += groups.pop()
    return groups


def _walks(
    model: nn.Module, data: Sequence[tuple[Run, Tensor | None]], points: Sequence[nn.Module], spent: Chain | None = None
) -> list[WaitingPass]:
    return [WaitingPass(model, run, points, spent) for run, _ in data]
