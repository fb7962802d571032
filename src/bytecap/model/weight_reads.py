"""Count how often one pass reads every parameter, by which shared blocks are known.

Counted at the functions that take the parameter itself, so a weight used raw counts like one used by its module.

>>> shared = nn.Linear(2, 2)
>>> module = nn.Sequential(shared, nn.Tanh(), shared)
>>> with Uses(module) as uses:
...     _ = module(torch.ones(1, 2))
>>> uses.count
{'0.weight': 2, '0.bias': 2}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Uses(TorchFunctionMode):
    """Counts calls that take a parameter and give a tensor.

    Attributes:
        count: by the parameter's first name.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names = {id(p): n for n, p in module.named_parameters()}
        self.count: dict[str, int] = dict.fromkeys(self._names.values(), 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one call."""
        del types
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor | tuple | list):
            for value in (*args, *(kwargs or {}).values()):
                for item in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(item, nn.Parameter) and id(item) in self._names and found is not item:
                        self.count[self._names[id(item)]] += isinstance(found, Tensor) or any(
                            isinstance(f, Tensor) for f in found
                        )
        return found


def count_uses(module: nn.Module, run: Any) -> dict[str, int]:
    """Count the uses of every parameter, by first name, in `run(module)` without gradients."""
    uses = Uses(module)
    with torch.no_grad(), uses:
        run(module)
    return uses.count
