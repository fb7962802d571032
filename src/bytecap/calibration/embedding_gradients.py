"""Collect gradients of embedding tables, sequence by sequence.

A table's own gradient sums all that a batch of sequences says about a token before it can be squared: unbiased, but
the more sequences, the noisier. At the output of a lookup every position still stands by itself, so a hook there sums
each sequence's gradients token by token, and batches may be as large as a GPU likes. That needs one lookup of the
batch's own tokens and nothing else; tables that are read in another way (positions, raw weights) are found out by what
a lookup leaves unexplained of their gradient, and keep that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.calibration.moments import Moment
from bytecap.model.hook_coverage import explains


class _Watch:
    """The calls of one embedding module, and its gradient as those lookups explain it."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.calls, self.same, self.gradient = ids, 0, True, torch.zeros(0)

    def forward_hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.calls += 1
        self.same &= len(args) == 1 and isinstance(args[0], Tensor) and torch.equal(args[0], self.ids)
        if self.same and output.requires_grad:
            output.register_hook(lambda g: self.add(module, g))

    def add(self, module: nn.Module, g: Tensor) -> None:
        weight: Any = module.weight
        sums = torch.zeros(weight.shape, device=g.device)
        self.gradient = sums.index_add_(0, self.ids.reshape(-1), g.reshape(-1, g.shape[-1]).float())

    def explains(self, weight: Tensor) -> bool:
        """Return whether the weight was looked up once, by these ids, and read nowhere else."""
        if self.calls != 1 or not self.same or weight.grad is None or self.gradient.shape != weight.shape:
            return False
        return explains(self.gradient, weight.grad)


def looked_up(modules: Mapping[str, nn.Module], ids: Tensor, loss: Callable[[], Tensor]) -> set[str]:
    """Return the names of embedding modules that only the model's own ids look up, once.

    Args:
        modules: embedding modules by name, each with a weight of its own.
        ids: (batch, length) with a batch of at least 2, unlike any positions.
        loss: of the model on these ids, a scalar to go backward from.
    """
    weights: dict[str, Any] = {n: m.weight for n, m in modules.items()}
    watched = {n: _Watch(ids) for n in modules}
    handles = [m.register_forward_hook(watched[n].forward_hook) for n, m in modules.items()]
    asked = {n: w.requires_grad for n, w in weights.items()}
    try:
        for w in weights.values():
            w.requires_grad_(True)
        with torch.enable_grad():
            loss().backward()
        return {n for n, w in weights.items() if watched[n].explains(w)}
    finally:
        for handle in handles:
            handle.remove()
        for n, w in weights.items():
            w.requires_grad_(asked[n])
            w.grad = None


class Lookup:
    """The second moment, row energies (rows,) and their sum () of one table, filled by a forward hook.

    Args:
        moment, rows, weight: where the sums go, float64.
    """

    def __init__(self, moment: Moment, rows: Tensor, weight: Tensor) -> None:
        self._moment, self._rows, self._weight = moment, rows, weight
        self.deliver: Callable[..., None] = self.take

    def forward_hook(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Cut the graph at the lookup's output, where its gradients can be read."""
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
        self.deliver(tokens % len(self._rows), sums)

    def take(self, tokens: Tensor, sums: Tensor) -> None:
        """Add the gradients (n, cols) of each sequence's own tokens (n,)."""
        square = sums.square().sum(1, dtype=torch.float64)
        self._rows.index_add_(0, tokens, square)
        self._moment.add(sums)
        self._weight += square.sum()
