"""Compute asymmetric targets: aim at the original outputs from the inputs that the coded prefix delivers.

Layers behind coded ones see other inputs `x^` than the original `x`. The best stand-in for `W` is then::

    W' = W + strength * W (E[(x - x^) x^T]) (E[x^ x^T] + ridge)^-1

Units are taken in the order the model calls them; modules fed by the same tensor form a stage, a stage is coded
before the next one is treated. Units with several uses (tied, looped, or read by more than their module) keep their
weights: one target cannot serve several inputs. They are coded before all others, so that the rest aims from what they
deliver. Where the order of calls depends on the data there are no targets at all.

Sources: WaterSIC (arXiv:2603.04956) and GPTAQ (arXiv:2504.02692) for the corrected target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from bytecap.allocation.correction import unit_values
from bytecap.allocation.planner import Planner, State
from bytecap.model import streaming
from bytecap.model.batches import Batch
from bytecap.model.forward import batch_tokens, batches
from bytecap.model.linears import linear_weights, maps_otherwise, of_transformers
from bytecap.model.quantized_copy import Values, load_values, share_storage
from bytecap.model.texts import Window
from bytecap.model.weight_reads import count_uses
from bytecap.progress import Advance
from bytecap.system import allocator
from bytecap.system.ranks import Ranks

_Item = TypeVar("_Item")
Run = Callable[[nn.Module], Any]  # one forward pass over one batch
_NOTHING = 1e-30  # second moment of inputs that a coded prefix of zeros delivers, which still has to be inverted
ROUND_TOKENS = {"cpu": 4096, "cuda": 16_384}  # waiting passes hold some 30 kB a token for hidden size 512


class LostError(Exception):
    """A pass did not call its modules in the order of the stages."""


class _Walk:
    """One forward pass that stops at every stage until it is asked for the next one.

    The pass is a coroutine, so a stage's weights can be replaced while many passes wait in front of it, and every
    pass is run only once. (Threads instead would each keep a pool of workers and buffers of their own.)
    """

    def __init__(self, model: nn.Module, run: Run, stops: Sequence[nn.Module]) -> None:
        self._pass = greenlet(self._run)
        self._arguments: tuple[Any, ...] | None = (model, run, stops)
        self._stops = iter(stops)

    def _run(self, model: nn.Module, run: Run, stops: Sequence[nn.Module]) -> None:
        handles = [m.register_forward_pre_hook(self._stop) for m in stops]
        try:
            run(model)
        finally:
            for handle in handles:
                handle.remove()

    def _stop(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if getcurrent() is self._pass and self._pass.parent is not None:  # else another pass over the same model
            self._pass.parent.switch((module, args[0]))

    def advance(self) -> Tensor:
        """Return the input of the next stage.

        Raises:
            LostError: the pass is somewhere else.
        """
        arguments, self._arguments = self._arguments or (), None
        found = self._pass.switch(*arguments)
        if not found or found[0] is not next(self._stops):
            raise LostError
        x: Tensor = found[1]
        return x

    def cancel(self) -> None:
        """Abandon the pass and remove its hooks."""
        self._pass.throw()


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
    original: nn.Module,
    quantized_copy: nn.Module,
    windows: Sequence[Window],
    *,
    strength: float,
    device: str,
    advance: Advance,
) -> dict[str, Tensor]:
    """Return the changes of units' targets, float32 (rows, cols) by unit name.

    The windows are walked in rounds, which bounds memory; targets are means over the rounds so far.

    Args:
        planner: prepared units.
        order: units that get targets, see `call_order`.
        state: steps and rules to code the prefix with, and the integers of all units that are not in `order`.
        original: untouched model.
        quantized_copy: a copy of it that holds quantized values, overwritten.
        windows: calibration windows.
        strength: 1 is the least-squares target, 0 the weight itself.
        device: torch device.
        advance: called with the share of the work that is done.
    """
    units = {p.unit.name: p for p in planner.matrices}
    if not order:
        return {}
    vocabulary = max(p.unit.matrix_shape[0] for p in planner.matrices)
    staged = {n for names in order for n in names}
    load_values(quantized_copy, unit_values(planner, state, [n for n in planner.names if n not in staged]))
    change: dict[str, Tensor] = {}
    groups = rounds(windows, ROUND_TOKENS[torch.device(device).type])
    for number, chosen in enumerate(groups):
        data = list(passes_of(chosen, batch_tokens(vocabulary), device))
        masks = [mask for _, mask in data]
        walks = [_walks(model, of_rank(data, planner.ranks), order) for model in (original, quantized_copy)]
        try:
            for stage, names in enumerate(order):
                inputs = ((a.advance(), b.advance()) for a, b in zip(*walks, strict=True))
                fix = fix_on(planner.ranks, stage, inputs, masks, device) * strength
                for n in names:
                    fresh = units[n].times(fix)
                    change[n] = change[n].lerp_(fresh, 1 / (number + 1)) if n in change else fresh
                members = [units[n].moved(change[n]) for n in names]
                prefix = replace(state, coded=planner.round(members, state.steps, state.rules))
                _only(quantized_copy, original, unit_values(planner, prefix, names), staged)
                del members, prefix
                allocator.release()
                advance(1 / len(order) / len(groups))
        finally:
            for walk in (w for group in walks for w in group):
                walk.cancel()
    return change


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
    units = {p.unit.name: p.unit for p in planner.matrices}
    order = [[n for n in names if n in units and not units[n].aliases] for names in _stages_of(model, windows, device)]
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


def _only(quantized_copy: nn.Module, original: nn.Module, values: Values, staged: set[str]) -> None:
    """Load values into the copy; other staged units share the original's storage, since no pass needs them again."""
    share_storage(quantized_copy, original, staged)
    load_values(quantized_copy, values)


def _walks(model: nn.Module, data: Sequence[tuple[Run, Tensor | None]], order: Sequence[Sequence[str]]) -> list[_Walk]:
    modules = linear_weights(model)
    return [_Walk(model, run, [modules[names[0]][0] for names in order]) for run, _ in data]


def of_rank(data: Sequence[_Item], ranks: Ranks) -> Sequence[_Item]:
    """Return the passes of this rank."""
    return data[ranks.rank :: ranks.size]


def fix_on(
    ranks: Ranks, stage: int, inputs: Iterable[tuple[Tensor, Tensor]], masks: Sequence[Tensor | None], device: str
) -> Tensor:
    """Return `fix_of` the passes of all ranks, solved by one of them.

    Args:
        ranks: processes, each with the passes that `of_rank` gives it.
        stage: number of the stage, which says who solves.
        inputs: x and x^ of this rank's passes.
        masks: of all passes.
        device: torch device.

    Raises:
        LostError: on all ranks, where one rank's pass was somewhere else.
    """
    if ranks.size == 1:
        return fix_of(inputs, masks)
    own: list[Tensor] = []
    lost = False
    try:
        own += [t for pair in inputs for t in pair]
    except LostError:
        lost = True
    if any(ranks.all(lost)):
        raise LostError
    solver = stage % ranks.size
    arrived = ranks.exchange([own if to == solver else [] for to in range(ranks.size)], device)
    found = None
    if ranks.rank == solver:
        parts = [iter(tensors) for tensors in arrived]
        owners = [parts[i % ranks.size] for i in range(len(masks))]
        found = [fix_of(((next(part), next(part)) for part in owners), masks)]
    return ranks.spread(found, solver, device)[0]


def fix_of(inputs: Iterable[tuple[Tensor, Tensor]], masks: Sequence[Tensor | None]) -> Tensor:
    """Solve for E[(x - x^) x^T] (E[x^ x^T] + ridge)^-1 of the next stage, in float64; float32 (cols, cols).

    Args:
        inputs: x and x^ of every batch.
        masks: of real tokens (batch, length), None where all are.
    """
    a: Tensor | float = 0.0
    c: Tensor | float = 0.0
    for (one, other), mask in zip(inputs, masks, strict=True):
        keep = slice(None) if mask is None else mask.reshape(-1)  # some models flatten (batch, length) before a layer
        x, seen = (t.flatten(0, -2)[keep].float() for t in (one, other))
        a = a + (seen.T @ seen).double()
        c = c + ((x - seen).T @ seen).double()
    assert isinstance(a, Tensor)  # noqa: S101 (there is at least one batch)
    assert isinstance(c, Tensor)  # noqa: S101
    a.diagonal().add_(max(1e-2 * float(a.diagonal().mean()), _NOTHING))
    fix: Tensor = torch.linalg.solve(a, c.T).T.float()
    return fix
