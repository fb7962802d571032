"""Find the residual streams that linear maps write into: tensors that their outputs are added to.

A map whose output is added to a stream can also make up for what earlier maps did wrong there, since the next reader
sees the sum alone. Nothing is known of architectures: one call of a block is watched, and a map counts where its
output plus the input of a module called before (or of the block itself) equals the input of a later module, or the
block's output, in every bit. Streams that are scaled or normed in between are not found, nor those whose sum no module
is given (attention and MLP side by side); such maps go without.

>>> class Block(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.norm, self.map = nn.LayerNorm(8), nn.Linear(8, 8)
...     def forward(self, x):
...         return x + self.map(self.norm(x))
>>> block, x = Block(), torch.randn(2, 8)
>>> streams_written(block, x, lambda: block(x), {"map.weight": block.map})
{'map.weight': ''}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.model.chain import first_of


@torch.no_grad()
def streams_written(
    block: nn.Module, given: Tensor, run: Callable[[], Any], maps: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Return the path inside a block of the module that is given the stream, by the name of the map that writes to it.

    Args:
        block: the block; its own path is the empty text.
        given: its input.
        run: calls it, and returns its output.
        maps: modules of linear maps inside it that are called once.
    """
    paths = {id(m): path for path, m in block.named_modules()}
    inputs: list[tuple[str, Tensor]] = [("", given)]
    written: dict[str, tuple[int, Tensor]] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is not block and args and isinstance(args[0], Tensor):
            inputs.append((paths[id(module)], args[0]))

    def behind(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and bool(output.any()):
                written[name] = len(inputs), output

        return hook

    handles = [m.register_forward_pre_hook(before) for m in block.modules()]
    handles += [m.register_forward_hook(behind(name)) for name, m in maps.items()]
    try:
        output = first_of(run())
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    calls = Counter(path for path, _ in inputs)
    for name, (called, values) in written.items():
        sums = [t for _, t in inputs[called:]] + ([output] if isinstance(output, Tensor) else [])
        for path, stream in inputs[:called]:
            once = calls[path] == 1 and path != paths[id(maps[name])]  # the call that has the stream has to be known
            if once and stream.shape == values.shape and any(_added(stream, values, t) for t in sums):
                found[name] = path
                break
    return found


def _added(one: Tensor, other: Tensor, total: Tensor) -> bool:
    return total.shape == one.shape and torch.equal(one + other, total)
