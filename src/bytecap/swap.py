"""Putting decoded values into a live module and taking them out again.

>>> import torch
>>> module = torch.nn.Linear(2, 1, bias=False); before = module.weight.detach().clone()
>>> with swapped(module, {"weight": np.zeros((1, 2), np.float32)}):
...     inside = module.weight.detach().clone()
>>> bool((inside == 0).all()), bool((module.weight == before).all())
(True, True)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bytecap.errors import ArtifactError

Values = Mapping[str, npt.NDArray[Any]]


@torch.no_grad()
def load_values(module: nn.Module, values: Values) -> None:
    """Copy stored-layout arrays into a module's tensors, in place.

    Raises:
        ArtifactError: a name or shape does not fit the module.
    """
    live = dict(module.state_dict(keep_vars=True))
    for name, array in values.items():
        if name not in live:
            raise ArtifactError(f"the model has no tensor {name}")
        if tuple(live[name].shape) != tuple(array.shape):
            raise ArtifactError(f"tensor {name} has shape {tuple(live[name].shape)}, the artifact {tuple(array.shape)}")
        live[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))


@contextlib.contextmanager
def swapped(module: nn.Module, values: Values) -> Iterator[None]:
    """The module with some tensors replaced; the old values return on leaving."""
    live = dict(module.state_dict(keep_vars=True))
    kept = {name: live[name].detach().clone() for name in values}
    try:
        load_values(module, values)
        yield
    finally:
        with torch.no_grad():
            for name, old in kept.items():
                live[name].copy_(old)
