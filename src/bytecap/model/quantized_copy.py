"""Put decoded values into a live module and take them out again.

>>> import torch
>>> module = torch.nn.Linear(2, 1, bias=False); before = module.weight.detach().clone()
>>> with swapped(module, {"weight": np.zeros((1, 2), np.float32)}):
...     inside = module.weight.detach().clone()
>>> bool((inside == 0).all()), bool((module.weight == before).all())
(True, True)
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bytecap.errors import ArtifactError
from bytecap.model import streaming
from bytecap.system.transfers import to_device
from bytecap.types import Unit

Values = Mapping[str, npt.NDArray[Any] | torch.Tensor]  # a tensor becomes the module's own


class Lazy(Values):
    """A mapping whose values are made when they are asked for, so that a whole model never exists twice.

    >>> values = Lazy(["a"], lambda name: np.zeros(3)); values["a"].shape
    (3,)
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], npt.NDArray[Any] | torch.Tensor]) -> None:
        self._names, self._make = tuple(names), make

    def __getitem__(self, name: str) -> npt.NDArray[Any] | torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def copy_of(module: nn.Module) -> nn.Module:
    """Return a copy that shares the original's storage, or its source, until values are loaded into it."""
    streamed = streaming.of(module)
    if streamed is not None:
        return streamed.copy().module
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {}
    for t in tensors:
        shared = t.detach()
        memo[id(t)] = nn.Parameter(shared, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else shared
    return copy.deepcopy(module, memo)


def as_stored(unit: Unit, matrix: torch.Tensor) -> torch.Tensor:
    """Return a tensor (rows, cols), as coders see it, in the unit's stored layout."""
    return (matrix.T if unit.transposed else matrix).reshape(unit.shape)


@torch.no_grad()
def share_storage(quantized_copy: nn.Module, original: nn.Module, names: Iterable[str] | None = None) -> None:
    """Let a copy share the original's storage again, which frees the values that were loaded into it.

    Args:
        quantized_copy: a copy of the original.
        original: untouched model.
        names: of parameters and buffers; all by default.
    """
    streamed = streaming.of(quantized_copy)
    if streamed is not None:
        for name in list(streamed.replaced) if names is None else names:
            streamed.replaced.pop(name, None)
        return
    source, tensors = (dict(m.state_dict(keep_vars=True)) for m in (original, quantized_copy))
    for name in tensors if names is None else names:
        if isinstance(source[name], torch.Tensor):  # not extra state
            tensors[name].data = source[name].data


@torch.no_grad()
def load_values(module: nn.Module, values: Values) -> None:
    """Make stored-layout arrays a module's tensors; the tensors' old storage is left alone.

    Raises:
        ArtifactError: a name or shape does not fit the module.
    """
    streamed = streaming.of(module)
    if streamed is not None:
        streamed.load(values)
        return
    _put(dict(module.state_dict(keep_vars=True)), values)


@torch.no_grad()
def _put(tensors: Mapping[str, torch.Tensor], values: Values) -> None:
    for name, array in values.items():
        if name not in tensors:
            raise ArtifactError(f"the model has no tensor {name}")
        if tuple(tensors[name].shape) != tuple(array.shape):
            raise ArtifactError(
                f"tensor {name} has shape {tuple(tensors[name].shape)}, the artifact {tuple(array.shape)}"
            )
        fresh = (
            array if isinstance(array, torch.Tensor) else torch.from_numpy(np.require(array, requirements=["C", "W"]))
        )
        tensors[name].data = to_device(fresh, tensors[name].device, tensors[name].dtype)


@contextlib.contextmanager
def swapped(module: nn.Module, values: Values) -> Iterator[None]:
    """Replace some tensors of a module in memory inside a `with` block; the old values return on leaving."""
    tensors = dict(module.state_dict(keep_vars=True))
    kept = {name: tensors[name].data for name in values}
    try:
        _put(tensors, values)
        yield
    finally:
        for name, old in kept.items():
            tensors[name].data = old
