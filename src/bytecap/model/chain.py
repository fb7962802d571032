"""Find a module's chain of blocks by watching one forward pass.

The chain is the longest `ModuleList` whose modules are all called once, in order, each with the tensor that the one
before returned and with the same kind of arguments. Nothing is known of architectures. Where a second argument carries
gradients to the embedding (inputs of their own for every layer) there is no chain: going backward block by block would
lose them.

>>> class Stack(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
...     def forward(self, x):
...         for part in self.parts:
...             x = part(x)
...         return x
>>> find_chain(stack := Stack(), lambda: stack(torch.ones(1, 4)))
Chain(path='parts', count=3, place=0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

_LEAST = 2


@dataclass(frozen=True)
class Chain:
    """A chain of blocks.

    Attributes:
        path: of the `ModuleList`.
        count: its blocks.
        place: which argument is the tensor handed on: a position, or a keyword.
    """

    path: str
    count: int
    place: int | str

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """The blocks of a module."""
        return list(module.get_submodule(self.path).children())

    def holds(self, path: str) -> bool:
        """Whether a submodule or tensor belongs to a block."""
        return path == self.path or path.startswith(f"{self.path}.")

    def taken(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The tensor handed on, among a block's arguments."""
        found: Tensor = args[self.place] if isinstance(self.place, int) else kwargs[self.place]
        return found

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with another tensor handed on."""
        if isinstance(self.place, int):
            return (*args[: self.place], x, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.place: x}

    def moved(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a block's arguments with the values handed on moved to a new tensor; the old one reads as NaN."""
        x = self.taken(args, kwargs)
        own = x.detach()
        let_go(x)
        return self.given(args, kwargs, own)


@dataclass
class _Calls:
    """The calls of one list's modules."""

    order: list[int] = field(default_factory=list)
    kinds: list[Any] = field(default_factory=list)
    places: list[set[int | str]] = field(default_factory=list)
    output: Tensor | None = None


def first_of(output: Any) -> Any:
    """The tensor that a block returns, alone or first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def with_first(output: Any, first: Tensor) -> Any:
    """A block's output with another tensor."""
    return (first, *output[1:]) if isinstance(output, tuple | list) else first


def find_chain(module: nn.Module, run: Callable[[], Any]) -> Chain | None:
    """Find the chain of a module; None if it has none.

    Args:
        module: to watch.
        run: one forward pass over it.
    """
    lists = {p: m for p, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) >= _LEAST}
    calls = {path: _Calls() for path in lists}
    handles = []
    for path, blocks in lists.items():
        for i, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(_before(calls[path], i), with_kwargs=True))
            handles.append(block.register_forward_hook(_behind(calls[path])))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for path, blocks in lists.items():
        seen = calls[path]
        if seen.order == list(range(len(blocks))) and all(k == seen.kinds[0] for k in seen.kinds):
            places = set.intersection(*seen.places[1:])
            if places and not _twice(blocks, module):
                found.append(Chain(path, len(blocks), min(places, key=str)))
    sizes = {c.path: sum(p.numel() for p in lists[c.path].parameters()) for c in found}
    return max(found, key=lambda c: (c.count, sizes[c.path]), default=None)


def let_go(x: Tensor) -> None:
    """Free a tensor's memory but keep its shape; every value reads as NaN from then on."""
    x.data = x.new_full((), torch.nan).expand(x.shape)


@torch.no_grad()
def hands_on_alone(module: nn.Module, run: Callable[[], Tensor], chain: Chain, wanted: Tensor) -> bool:
    """Return whether nobody but a block itself reads what it is given.

    The code around the blocks often keeps it, as long as a pass waits. It is tried on a pass whose blocks are given
    tensors of their own, and nothing is left of the others. One that is there after the pass (a parameter) will be read
    by the next one.

    Args:
        module: to watch.
        run: one pass over it, which returns its logits.
        chain: its blocks.
        wanted: the logits of that pass.
    """
    kept = list[tuple[ref[Tensor], Tensor]]()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = chain.taken(args, kwargs)
        kept.append((ref(x), x.data))
        return chain.moved(args, kwargs)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in chain.blocks(module)]
    try:
        found = run()
    except Exception:  # noqa: BLE001 (a model's own code may refuse what is no number in any way)
        return False
    finally:
        for handle in handles:
            handle.remove()
        left = [(x, values) for there, values in kept if (x := there()) is not None]
        for x, values in left:
            x.data = values
    return not left and torch.equal(found, wanted)


def _before(calls: _Calls, number: int) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named: dict[int | str, Any] = dict(enumerate(args))
        named.update(kwargs)
        calls.order.append(number)
        calls.kinds.append(sorted((str(k), type(v).__name__) for k, v in named.items()))
        same = {k for k, v in named.items() if isinstance(v, Tensor) and v is calls.output}
        calls.places.append(same)

    return hook


def _behind(calls: _Calls) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        calls.output = first_of(output)

    return hook


def _twice(blocks: nn.ModuleList, module: nn.Module) -> bool:
    """Whether a tensor of the blocks is found in two of them, or elsewhere too."""
    inside = [id(p) for b in blocks for p in {id(p): p for p in b.parameters()}.values()]
    everywhere = [id(p) for m in module.modules() for p in m.parameters(recurse=False)]
    return len(set(inside)) < len(inside) or sum(map(set(inside).__contains__, everywhere)) > len(inside)
