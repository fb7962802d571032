"""Convert linear layers to `PQuantLinear` before training, and back after it.

>>> module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
>>> replace(module, 0.1)
['0', '2']
>>> module[0].wide, type(inference(module)[0]).__name__
(6, 'Linear')
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bytecap.errors import UsageError
from bytecap_lab.train.pquant import PQuantLinear, rounded_inputs

Choose = Callable[[str, nn.Linear], Mapping[str, Any] | None]


class RoundedInputLinear(nn.Linear):
    """A linear layer that rounds its inputs as `PQuantLinear` does, made of one that was trained so."""

    activations = 8

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name it has in nn.Linear)
        """As `nn.Linear`, inputs rounded."""
        return functional.linear(rounded_inputs(input, self.activations), self.weight, self.bias)


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """(parent, attribute, full name, child) of every registered child; shared ones once for each place."""
    for name, child in module.named_modules(remove_duplicate=False):
        if name:
            parent, _, key = name.rpartition(".")
            yield module.get_submodule(parent), key, name, child


def _tied(module: nn.Module) -> set[int]:
    """Identities of the parameters that more than one module owns."""
    owners: dict[int, int] = {}
    for m in module.modules():
        for p in m.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def replace(
    module: nn.Module, share: float = 0.05, *, choose: Choose | None = None, activations: int | None = None
) -> list[str]:
    """Put a `PQuantLinear` in place of a module's linear layers, in place, latent weights as they were.

    Layers whose weight another module owns too (a tied head) stay as they are, as do subclasses of `nn.Linear`.

    Args:
        module: what to change. It may not itself be a linear layer.
        share: of every layer's columns in the 8-bit branch, where `choose` is None.
        choose: `choose(name, layer)` gives keywords for `PQuantLinear` (`wide`, `axis`), or None to leave one alone.
        activations: see `PQuantLinear`.

    Returns:
        Names of the layers replaced.

    Raises:
        UsageError: there is none.
    """
    made: dict[int, PQuantLinear | None] = {}
    tied, names = _tied(module), []
    for parent, key, name, child in list(_places(module)):
        if type(child) is not nn.Linear or id(child.weight) in tied:
            continue
        if id(child) not in made:
            how = {"wide": round(share * child.in_features)} if choose is None else choose(name, child)
            made[id(child)] = None if how is None else _trained(child, {"activations": activations, **how})
            names += [] if how is None else [name]
        fresh = made[id(child)]
        if fresh is not None:
            setattr(parent, key, fresh)
    if not names:
        raise UsageError(f"{type(module).__name__} holds no nn.Linear that could be replaced")
    return names


def _trained(layer: nn.Linear, how: Mapping[str, Any]) -> PQuantLinear:
    weight = layer.weight
    fresh = PQuantLinear(
        layer.in_features, layer.out_features, layer.bias is not None, device=weight.device, dtype=weight.dtype, **how
    )
    fresh.weight, fresh.bias = weight, layer.bias
    return fresh.train(layer.training)


@torch.no_grad()
def _finished(layer: PQuantLinear) -> nn.Linear:
    """An ordinary layer with the quantized weights."""
    kind = nn.Linear if layer.activations is None else RoundedInputLinear
    with torch.device("meta"):
        fresh = kind(layer.in_features, layer.out_features, layer.bias is not None)
    fresh.weight = nn.Parameter(layer.quantized(), requires_grad=False)
    fresh.bias = layer.bias
    if layer.activations is not None:
        fresh.activations = layer.activations  # type: ignore[assignment]
    return fresh.train(layer.training)


def inference(module: nn.Module) -> nn.Module:
    """A copy in which every `PQuantLinear` is an ordinary linear layer with the weights that its forward pass used.

    It gives the outputs of the trained module, and is what a file of `bytecap_lab.train.export` can be loaded into.
    """
    if isinstance(module, PQuantLinear):
        return _finished(copy.deepcopy(module))
    twin = copy.deepcopy(module)
    made: dict[int, nn.Linear] = {}
    for parent, key, _, child in list(_places(twin)):
        if isinstance(child, PQuantLinear):
            if id(child) not in made:
                made[id(child)] = _finished(child)
            setattr(parent, key, made[id(child)])
    return twin
