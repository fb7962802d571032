"""Gradients of embedding tables, sequence by sequence.

A table's own gradient sums all that a batch of sequences says about a token before it can be squared: unbiased, but
the more sequences, the noisier. At the output of a lookup every position still stands by itself, so a hook there sums
each sequence's gradients token by token, and batches may be as large as a GPU likes. That needs lookups of the batch's
own tokens; tables read in another way (positions, raw weights) have to be found out and keep their own gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def looked_up(modules: Mapping[str, nn.Module], ids: Tensor, run: Callable[[Tensor], Any]) -> set[str]:
    """Names of embedding modules that are called with exactly the ids that the model is given.

    Args:
        modules: embedding modules by name.
        ids: (batch, length) with a batch of at least 2, unlike any positions.
        run: a forward pass over ids.
    """
    seen: dict[str, bool] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            same = len(args) == 1 and isinstance(args[0], Tensor) and torch.equal(args[0], ids)
            seen[name] = seen.get(name, True) and same

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in modules.items()]
    try:
        with torch.no_grad():
            run(ids)
    finally:
        for handle in handles:
            handle.remove()
    return {n for n, m in modules.items() if seen.get(n) and type(m).forward is nn.Embedding.forward}


class Lookup:
    """Second moment (1, cols, cols), row energies (rows,) and their sum (1,) of one table, filled by a forward hook.

    Args:
        moment, rows, weight: where the sums go, float64.
    """

    def __init__(self, moment: Tensor, rows: Tensor, weight: Tensor) -> None:
        self._moment, self._rows, self._weight = moment, rows, weight

    def forward_hook(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Cut the graph at the lookup's output, where gradients are to be seen."""
        if not torch.is_grad_enabled():
            return None
        leaf = output.detach().requires_grad_()
        leaf.register_hook(lambda g: self.add(args[0], g))
        return leaf.clone()  # a leaf could not be changed in place

    def add(self, ids: Tensor, g: Tensor) -> None:
        """Add tokens ids (batch, length) with the gradients g (batch, length, cols) at their lookups."""
        own = ids + len(self._rows) * torch.arange(len(ids), device=ids.device)[:, None]
        tokens, at = torch.unique(own, return_inverse=True)
        sums = torch.zeros(len(tokens), g.shape[-1], device=g.device)
        sums.index_add_(0, at.reshape(-1), g.reshape(-1, g.shape[-1]).float())
        square = sums.square().sum(1, dtype=torch.float64)
        self._rows.index_add_(0, tokens % len(self._rows), square)
        self._moment[0] += sums.T @ sums
        self._weight[0] += square.sum()
