"""Drift targets: aim at the original outputs from the inputs the coded prefix really delivers.

Layers behind coded ones see other inputs `x^` than the original `x`. The best stand-in for `W` is then::

    W' = W + strength * W (E[(x - x^) x^T]) (E[x^ x^T] + ridge)^-1

Units are taken in the order the model calls them; modules fed by the same tensor form a stage, a stage is coded
before the next one is looked at. Each stage costs a forward pass of both models up to its inputs, so a bounded
number of tokens is used. Units with several uses keep their weights.

Sources: WaterSIC (arXiv:2603.04956) and GPTAQ (arXiv:2504.02692) for the corrected target.
"""

from __future__ import annotations

import threading
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


class _Cancelled(Exception):  # noqa: N818 (control flow, never seen outside)
    """The rest of a forward pass is not needed."""


class _Walk:
    """One forward pass that stops at every stage until it is asked for the next one.

    The pass runs in a thread of its own, but never at the same time as its caller: each hands over to the other.
    So a stage's weights can be replaced while many passes wait in front of it, and every pass is run only once.
    """

    def __init__(self, model: nn.Module, ids: Tensor, stops: Sequence[nn.Module]) -> None:
        self._stops = {id(m) for m in stops}
        self._input: Tensor | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(model, ids, stops), daemon=True)
        self._thread.start()

    def _run(self, model: nn.Module, ids: Tensor, stops: Sequence[nn.Module]) -> None:
        self._go.acquire()
        handles = [m.register_forward_pre_hook(self._stop) for m in stops]
        try:
            with torch.no_grad():
                if not self._cancelled:
                    model(ids)
        except _Cancelled:
            pass
        except BaseException as exc:  # noqa: BLE001 (handed to the caller)
            self._error = exc
        finally:
            for handle in handles:
                handle.remove()
            self._stopped.release()

    def _stop(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.current_thread() is not self._thread:
            return  # another pass over the same model
        self._input = args[0]
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def advance(self) -> Tensor:
        """Input of the next stage."""
        self._input = None
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        assert self._input is not None  # noqa: S101 (stages were listed from the same model)
        return self._input

    def cancel(self) -> None:
        """Let the thread end."""
        self._cancelled = True
        self._go.release()
        self._thread.join()


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
    plan = [
        [n for n in names if n in units and not units[n].unit.aliases] for names in stages(original, data[0][0][:1])
    ]
    plan = [names for names in plan if names]
    staged = {n for names in plan for n in names}
    load_values(twin, unit_values(planner, state, [n for n in planner.names if n not in staged]))
    walks = [_walks(model, data, plan) for model in (original, twin)]
    try:
        for names in plan:
            a, c = _moments(walks, [mask for _, mask in data])
            fix = torch.linalg.solve(a, c.T).T.float() * strength  # C A^-1
            members = [replace(units[n], weight=units[n].weight + units[n].weight @ fix) for n in names]
            units.update({p.unit.name: p for p in members})
            rounded, _ = round_units(members, state.steps, planner.shrink, planner.options)
            partial = State(state.steps, {**state.coded, **rounded}, state.shared, {}, {})
            load_values(twin, unit_values(planner, partial, names))
            advance(1)
    finally:
        for walk in (w for group in walks for w in group):
            walk.cancel()
    return [units[p.unit.name] for p in planner.matrices]


def _walks(model: nn.Module, data: list[tuple[Tensor, Tensor]], plan: list[list[str]]) -> list[_Walk]:
    modules = linear_weights(model)
    return [_Walk(model, ids, [modules[names[0]][0] for names in plan]) for ids, _ in data]


def _moments(walks: list[list[_Walk]], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(E[x^ x^T] with a ridge, E[(x - x^) x^T]) of the next stage, in float64."""
    a: Tensor | float = 0.0
    c: Tensor | float = 0.0
    for original, twin, mask in zip(*walks, masks, strict=True):
        keep = mask.reshape(-1)  # some models flatten (batch, length) before a layer
        x, seen = (walk.advance().flatten(0, -2)[keep].float() for walk in (original, twin))
        a = a + (seen.T @ seen).double()
        c = c + ((x - seen).T @ seen).double()
    assert isinstance(a, Tensor)  # noqa: S101 (there is at least one batch)
    assert isinstance(c, Tensor)  # noqa: S101
    a.diagonal().add_(1e-2 * float(a.diagonal().mean()))
    return a, c
