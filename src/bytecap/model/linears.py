"""Find the linear maps and embeddings of a module by the types of its modules; no architecture is named.

>>> import torch
>>> list(linear_weights(torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 3))))
['0.weight', '1.weight']
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def linear_weights(module: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """Return linear maps and embeddings: state-dict name to (module, `linear` | `conv1d` | `embedding`)."""
    from torch import nn

    found: dict[str, tuple[nn.Module, str]] = {}
    for name, m in module.named_modules():
        kind = None
        if isinstance(m, nn.Linear):
            kind = "linear"
        elif isinstance(m, nn.Embedding):
            kind = "embedding"
        elif type(m).__name__ == "Conv1D" and hasattr(m, "nf"):
            kind = "conv1d"
        if kind is not None:
            found[f"{name}.weight" if name else "weight"] = (m, kind)
    return found


def of_transformers(module: torch.nn.Module) -> bool:
    """Return whether transformers wrote the module's class, whose passes may run in bfloat16."""
    return any(c.__module__.partition(".")[0] == "transformers" for c in type(module).__mro__)


def place_of(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """What tells a tensor of a module from others: its memory and shape; the object itself where it holds no values."""
    own = tensor.numel() and not tensor.is_meta
    return tensor.data_ptr() if own else id(tensor), tuple(tensor.shape)
