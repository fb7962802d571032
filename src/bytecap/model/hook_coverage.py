"""Find the weights whose gradients hooks on linear modules do not explain.

A hook sees a weight at work only when its module is called. A weight that is also read raw (`F.linear(x, m.weight)`, an
einsum, a fused kernel), or never through its module, would look less important than it is, or not at all. So on one
batch the gradient that the hooks can explain, `sum_t g_t x_t^T`, is compared with the gradient autograd finds: where
they differ the unit's own gradients are collected instead. A weight whose module is called k times is explained: the
hook runs k times and its statistics add up.

A matrix collected by gradients gets the second moment of its gradient over columns as `H` and its row energies as
`G` (a Kronecker factorisation of the Fisher). With few samples the moment is shrunk towards its diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.model.linears import maps_tokens
from bytecap.types import Unit

_EXPLAINED = 0.05  # relative difference that rounding may make
WIDEST = 8192  # columns a dense second moment is kept for


def is_matrix(unit: Unit) -> bool:
    """Return whether a unit that is no linear map has rows and columns to collect energies for."""
    return not unit.linear and min(unit.matrix_shape) > 1 and unit.matrix_shape[1] <= WIDEST


def shrunk_moment(moment: Tensor, samples: int) -> Tensor:
    """Return the second moment (cols, cols) of few samples, with off-diagonal entries times n / (n + cols).

    >>> shrunk_moment(torch.ones(2, 2), 2)
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    share = samples / (samples + len(moment))
    found = moment * share
    found.diagonal().copy_(moment.diagonal())
    return found


def explains(part: Tensor, whole: Tensor) -> bool:
    """Return whether the gradient that hooks saw is a weight's whole gradient, up to rounding."""
    found = whole.float()
    return float((found - part).norm()) <= _EXPLAINED * float(found.norm())


class Account:
    """Compares what hooks explain with what autograd finds.

    Attributes:
        unexplained: weights whose own gradients must be collected.
        frozen: weights whose module's output has no gradient unless the weight itself asks for one.
    """

    def __init__(self, modules: Mapping[str, tuple[nn.Module, str]], run: Callable[[], Tensor]) -> None:
        weights: dict[str, Any] = {n: m.weight for n, (m, kind) in modules.items() if kind != "embedding"}
        self.frozen: set[str] = set()
        self._explained: dict[int, Tensor] = {}
        self._recording = False
        handles = [modules[n][0].register_forward_hook(self._hook(n, w)) for n, w in weights.items()]
        try:
            run()
            self._recording = True
            for w in weights.values():
                w.requires_grad_(True)
            run().backward()
        finally:
            for handle in handles:
                handle.remove()
        self.unexplained = {n for n, w in weights.items() if not self._matches(w)}
        for w in weights.values():
            w.grad = None
            w.requires_grad_(False)

    def _hook(self, name: str, weight: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not maps_tokens(module, args[0], output):
                return
            if not self._recording:
                if not output.requires_grad:
                    self.frozen.add(name)
                return
            x = args[0].detach()
            if output.requires_grad:
                output.register_hook(lambda g: self._add(weight, x, g))

        return hook

    def _add(self, weight: Tensor, x: Tensor, g: Tensor) -> None:
        part = g.reshape(-1, g.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
        part = part if part.shape == weight.shape else part.T
        known = self._explained.get(id(weight))
        self._explained[id(weight)] = part if known is None else known + part

    def _matches(self, weight: Tensor) -> bool:
        if weight.grad is None:
            return True
        none = torch.zeros_like(weight.grad, dtype=torch.float32)
        return explains(self._explained.get(id(weight), none), weight.grad)
