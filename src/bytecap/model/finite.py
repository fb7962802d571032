"""Refuse values that are not finite, reading them once and copying nothing.

>>> check("a", torch.tensor([[1.0, 2.0]]))
>>> check("a", torch.tensor([[1.0, float("nan")]]))
Traceback (most recent call last):
bytecap.errors.CheckpointError: tensor a holds nan at index [0, 1]
"""

from __future__ import annotations

import torch
from torch import Tensor

from bytecap.errors import CheckpointError


def check(name: str, values: Tensor) -> None:
    """Refuse infinities and NaN in a tensor of any shape.

    Raises:
        CheckpointError: tensor and index are named.
    """
    if not values.numel() or bool(torch.isfinite(torch.stack(values.detach().aminmax())).all()):  # NaN is both ends
        return
    index = tuple(int(i) for i in (~torch.isfinite(values)).nonzero()[0])
    raise CheckpointError(f"tensor {name} holds {float(values[index] if index else values)} at index {list(index)}")
