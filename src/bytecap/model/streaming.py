"""Run a model of which one block at a time is in memory.

The module is built without values (parameters on the `meta` device). Its chain of blocks is found by watching one
forward pass, not by name: the longest `ModuleList` whose modules are called one after the other, each fed by what the
one before returned, with the same kind of arguments. A `Streamed` then gives a module its values where they are needed:
one block's as the chain is walked, and those of modules outside the chain as they are called.

Passes over many batches are coroutines that stop in front of every block, so that each block is read once for all
of them whatever the model does between its blocks. Weights come from safetensors files (`Tensors`), piece by piece, or
from what was coded (`Streamed.load`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from bytecap.model.chain import Chain, first_of, with_first
from bytecap.model.forward import kept_exact
from bytecap.model.tensor_files import Tensors
from bytecap.system.allocator import release
from bytecap.system.transfers import to_device

Run = Callable[[nn.Module], Any]
_ATTRIBUTE = "_bytecap_streamed"


@dataclass(eq=False)
class Streamed:
    """A module without values, and where they are.

    Attributes:
        module: the module; its parameters are on the `meta` device between passes.
        chain: its blocks.
        tensors: the values.
        first: unit name of every name in the state dict.
        device: where passes run.
        dtype: of parameters while they are loaded.
        replaced: values that stand in for those of the files, by unit name; read when they are needed.
        trained: names of parameters that ask for a gradient while they are loaded.
        head: path of the linear map whose output is the pass's logits; None where something follows it.
        aside: modules taken out of the module for a while, by path.
        alone: whether nobody but a block reads what it is given, see `bytecap.model.chain.hands_on_alone`.
    """

    module: nn.Module
    chain: Chain
    tensors: Tensors
    first: Mapping[str, str]
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (a constant)
    dtype: torch.dtype = torch.float32
    replaced: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    head: str | None = None
    aside: dict[str, nn.Module] = field(default_factory=dict)
    alone: bool = False

    def copy(self, dtype: torch.dtype | None = None) -> Streamed:
        """Return a module of its own with the same values, in another dtype if one is given."""
        vars(self.module).pop(_ATTRIBUTE, None)
        module = copy.deepcopy(self.module)
        attach(self)
        found = Streamed(
            module, self.chain, self.tensors, self.first, self.device, dtype or self.dtype, dict(self.replaced),
            head=self.head, alone=self.alone,
        )  # fmt: skip
        if dtype is not None:
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point() and not found.exact(name):
                    buffer.data = buffer.data.to(dtype)
        return attach(found)

    def variant(self, values: Mapping[str, Any]) -> Streamed:
        """Return the same module with other values in place of some; only one of them may be loaded at a time."""
        found = replace(self, replaced=dict(self.replaced))
        found.load(values)
        return found

    def to(self, device: torch.device | str) -> None:
        """Let passes run on a device from now on."""
        self.device = torch.device(device)
        for buffer in self.module.buffers():
            buffer.data = buffer.data.to(self.device)

    def load(self, values: Mapping[str, Any]) -> None:
        """Let values stand in for those of the files; they are asked for whenever they are needed."""
        self.replaced.update(dict.fromkeys(values, values))

    def value(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor's value on the device, by any of its names."""
        unit, wanted = self.first[name], dtype or self.dtype
        if unit not in self.replaced:
            return self.tensors.read(unit, self.device, wanted)
        found = self.replaced[unit][unit]
        if not isinstance(found, Tensor):
            found = torch.from_numpy(np.require(found, requirements=["C", "W"]))
        return to_device(found, self.device, wanted if found.is_floating_point() else None)

    @cached_property
    def exact(self) -> Callable[[str], bool]:
        """Whether a tensor stays in float32 whatever the dtype, by its name."""
        return kept_exact(self.module)

    @property
    def blocks(self) -> list[nn.Module]:
        """The chain's modules."""
        return self.chain.blocks(self.module)

    @contextmanager
    def block(self, number: int, cache: dict[Any, Tensor] | None = None) -> Iterator[nn.Module]:
        """Give one block its values inside a `with` block.

        Args:
            number: of the block.
            cache: of loaded tensors, for several modules that share them.
        """
        prefix = f"{self.chain.path}.{number}"
        block = self.blocks[number]
        with ExitStack() as undo:
            self.fill(block, prefix, undo, {} if cache is None else cache, deep=True)
            yield block

    @contextmanager
    def outside(self, cache: dict[Any, Tensor] | None = None) -> Iterator[None]:
        """Give modules outside the chain their values as they are called, until the `with` block ends.

        Args:
            cache: of loaded tensors, for several modules that share them.
        """
        held: dict[Any, Tensor] = {} if cache is None else cache
        filled: set[str] = set()
        with ExitStack() as undo:

            def fill(path: str) -> Callable[..., None]:
                def hook(m: nn.Module, *_: Any) -> None:
                    if path not in filled:
                        filled.add(path)
                        self.fill(m, path, undo, held, deep=False)

                return hook

            for path, m in [*self.module.named_modules(), *self.aside.items()]:
                if not self.chain.holds(path) and any(True for _ in m.parameters(recurse=False)):
                    undo.callback(m.register_forward_pre_hook(fill(path)).remove)
            yield

    def fill(self, module: nn.Module, path: str, undo: ExitStack, held: dict[Any, Tensor], *, deep: bool) -> None:
        """Replace a module's empty parameters by loaded ones, until `undo` is closed."""
        for inner, owner in list(module.named_modules()) if deep else [("", module)]:
            for leaf, empty in list(owner.named_parameters(recurse=False)):
                if not empty.is_meta:  # loaded already
                    continue
                name = ".".join(p for p in (path, inner, leaf) if p)
                key = (self.first[name], id(self.replaced.get(self.first[name])), self.dtype)
                value = held.get(key)
                if value is None:
                    value = held[key] = self.value(name, torch.float32 if self.exact(name) else None)
                setattr(owner, leaf, nn.Parameter(value, requires_grad=name in self.trained))
                undo.callback(setattr, owner, leaf, empty)


def attach(streamed: Streamed) -> Streamed:
    """Let `of` find this by its module."""
    vars(streamed.module)[_ATTRIBUTE] = streamed
    return streamed


def of(module: nn.Module) -> Streamed | None:
    """Return the source of a module's values; None for modules that hold their values."""
    found: Streamed | None = vars(module).get(_ATTRIBUTE)
    return found


class Pass:
    """One forward pass that stops in front of every block, and behind the last one, until it is asked to go on.

    Args:
        streamed: what to run.
        run: the pass, given the module.
        stops: other modules to stop in front of.

    Attributes:
        at: the module that it waits in front of, or behind.
    """

    def __init__(self, streamed: Streamed, run: Run, stops: Sequence[nn.Module] = ()) -> None:
        self._streamed, self._run, self._stops = streamed, run, stops
        self.at: nn.Module | None = None
        self._greenlet = greenlet(self._work)

    def _work(self, _first: None) -> Any:
        blocks = self._streamed.blocks
        handles = [m.register_forward_pre_hook(self._before, with_kwargs=True) for m in [*blocks, *self._stops]]
        handles.append(blocks[-1].register_forward_hook(self._behind))
        try:
            return self._run(self._streamed.module)
        finally:
            for handle in handles:
                handle.remove()

    def _switch(self, *found: Any) -> Any:
        parent = self._greenlet.parent
        assert parent is not None  # noqa: S101 (a pass is only ever switched to)
        return parent.switch(*found)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getcurrent() is not self._greenlet:
            return None
        self.at = module
        self._switch((args, kwargs))
        if not self._streamed.alone or torch.is_grad_enabled() or module in self._stops:
            return None
        return self._streamed.chain.moved(args, kwargs)

    def _behind(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if getcurrent() is not self._greenlet:
            return None
        self.at = module
        instead = self._switch(first_of(output))
        return None if instead is None else with_first(output, instead)

    def advance(self, instead: Tensor | None = None) -> Any:
        """Go on to the next stop.

        Args:
            instead: behind the last block, what takes the place of its output.

        Returns:
            Arguments of the next block, then the last block's output, then what the pass returns.
        """
        return self._greenlet.switch(instead)

    def cancel(self) -> None:
        """Leave the pass; only its hooks are tidied up."""
        if self._greenlet:
            self._greenlet.throw()


def run(module: nn.Module, work: Run) -> Any:
    """Return what one pass over a module returns, streamed if it is."""
    streamed = of(module)
    if streamed is None:
        return work(module)
    found = None
    for (end,) in sweep([streamed], [work]):
        found = end()
    return found


@torch.no_grad()
def sweep(
    lanes: Sequence[Streamed], runs: Sequence[Run], cache: dict[Any, Tensor] | None = None
) -> Iterator[tuple[Callable[[], Any], ...]]:
    """Yield the ends of every pass, for several models side by side; each block of each is loaded once for all passes.

    Args:
        lanes: models with chains of one length; variants of one model may share its module.
        runs: passes.
        cache: filled with what the passes' ends load.

    Yields:
        For every pass and model, a function that goes from behind the last block to the end of the pass and returns
        what it returns; to be called once, and before the next pass is asked for.
    """
    passes = [[Pass(lane, run) for run in runs] for lane in lanes]
    try:
        first: dict[Any, Tensor] = {}
        for lane, group in zip(lanes, passes, strict=True):
            with lane.outside(first):
                _advance(group)
        del first
        held: dict[Any, Tensor] = {}
        for number in range(lanes[0].chain.count):
            for lane, group in zip(lanes, passes, strict=True):
                with lane.block(number, held):
                    _advance(group)
            held.clear()
            release()
        last: dict[Any, Tensor] = {} if cache is None else cache
        for together in zip(*passes, strict=True):
            yield tuple(partial(_ended, p, lane, last) for p, lane in zip(together, lanes, strict=True))
    finally:
        for p in (p for group in passes for p in group):
            p.cancel()


def _ended(p: Pass, lane: Streamed, cache: dict[Any, Tensor]) -> Any:
    with lane.outside(cache):
        return p.advance()


def _advance(group: Sequence[Pass]) -> None:
    for p in group:
        p.advance()
