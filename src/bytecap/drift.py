"""Drift targets: aim at the original outputs from the inputs the coded prefix really delivers.

Layers behind coded ones see other inputs `x^` than the original `x`. The best stand-in for `W` is then::

    W' = W + strength * W (E[(x - x^) x^T]) (E[x^ x^T] + ridge)^-1

Units are taken in the order the model calls them; modules fed by the same tensor form a stage, a stage is coded
before the next one is looked at. Each stage costs a forward pass of both models up to its inputs, so a bounded
number of tokens is used. Units with several uses keep their weights.

Sources: WaterSIC (arXiv:2603.04956) and GPTAQ (arXiv:2504.02692) for the corrected target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.correct import unit_values
from bytecap.methods.waterfill import Planner, State
from bytecap.model.checkpoint import linear_weights
from bytecap.model.probe import batch_tokens, batches
from bytecap.model.text import Window
from bytecap.progress import Advance
from bytecap.swap import load_values
from bytecap.sweep import Prepared, round_units


class _Reached(Exception):  # noqa: N818 (control flow, never seen outside)
    """The stage's input has been captured; the rest of the forward pass is not needed."""


def _input_of(model: nn.Module, stage: nn.Module, ids: Tensor) -> Tensor:
    """Input of the first module of a stage."""
    caught: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0].detach())
        raise _Reached

    handle = stage.register_forward_pre_hook(hook)
    try:
        model(ids)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


def stages(model: nn.Module, ids: Tensor) -> list[list[str]]:
    """Names of linear modules in calling order, grouped where they are fed by the same tensor."""
    order: list[tuple[str, tuple[int, Any]]] = []
    keep: list[Tensor] = []  # inputs stay alive, or their addresses would be used again
    handles = []
    for name, (module, kind) in linear_weights(model).items():
        if kind == "embedding":
            continue

        def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            keep.append(args[0])
            order.append((name, (args[0].data_ptr(), args[0].shape)))

        handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    called = [name for name, _ in order]
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
    state: State,
    original: nn.Module,
    twin: nn.Module,
    windows: Sequence[Window],
    *,
    strength: float,
    device: str,
    advance: Advance,
) -> list[Prepared]:
    """Prepared units with drift targets instead of weights; `twin` ends up holding the coded values.

    Args:
        planner: prepared units.
        state: steps to code the prefix at.
        original: untouched model.
        twin: equal model, overwritten.
        windows: calibration windows.
        strength: 1 is the least-squares target, 0 the weight itself.
        device: torch device.
        advance: called once a stage.
    """
    units = {p.unit.name: p for p in planner.matrices}
    vocabulary = max((p.unit.matrix_shape[0] for p in planner.matrices), default=4096)
    data = [(ids[:, :-1].to(device), mask.to(device)) for ids, mask in batches(windows, batch_tokens(vocabulary))]
    plan = stages(original, data[0][0][:1])
    modules, coded = linear_weights(original), linear_weights(twin)
    staged = {n for names in plan for n in names if n in units and not units[n].unit.aliases}
    load_values(twin, unit_values(planner, state, [n for n in planner.names if n not in staged]))
    for names in plan:
        members = [units[n] for n in names if n in staged]
        if members:
            a, c = _moments(original, twin, modules[names[0]][0], coded[names[0]][0], data)
            fix = torch.linalg.solve(a, c.T).T.float() * strength  # C A^-1
            members = [replace(p, weight=p.weight + p.weight @ fix.to(p.weight.device)) for p in members]
            units.update({p.unit.name: p for p in members})
            rounded, _ = round_units(members, state.steps, planner.shrink, planner.options)
            partial = State(state.steps, {**state.coded, **rounded}, state.shared, {}, {})
            load_values(twin, unit_values(planner, partial, [p.unit.name for p in members]))
        advance(1)
    return [units[p.unit.name] for p in planner.matrices]


def _moments(
    original: nn.Module, twin: nn.Module, stage: nn.Module, stage_twin: nn.Module, data: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(E[x^ x^T] with a ridge, E[(x - x^) x^T]) in float64."""
    a: Tensor | float = 0.0
    c: Tensor | float = 0.0
    for ids, mask in data:
        x = _input_of(original, stage, ids)[mask].float()
        seen = _input_of(twin, stage_twin, ids)[mask].float()
        a = a + (seen.T @ seen).double()
        c = c + ((x - seen).T @ seen).double()
    assert isinstance(a, Tensor)  # noqa: S101 (there is at least one batch)
    assert isinstance(c, Tensor)  # noqa: S101
    a.diagonal().add_(1e-2 * float(a.diagonal().mean()))
    return a, c
