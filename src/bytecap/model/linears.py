"""Find the linear maps and embeddings of a module by the types of its modules; no architecture is named.

>>> import torch
>>> list(linear_weights(torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 3))))
['0.weight', '1.weight']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def maps_otherwise(module: nn.Module) -> bool:
    """Return whether a linear map's class has a forward of its own, as routers and maps of groups of rows have.

    Its output need not be `x @ weight.T`, so hooks at its ends need not explain the weight's gradient.
    """
    from torch import nn

    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def maps_tokens(module: nn.Module, given: Any, output: Any) -> bool:
    """Return whether a call of a linear map gave every token of its input a channel for every row of the weight."""
    import torch
    from torch import nn

    if not (isinstance(given, torch.Tensor) and isinstance(output, torch.Tensor)):
        return False
    if output.shape[:-1] != given.shape[:-1]:
        return False
    if not isinstance(module, nn.Linear):
        return True
    return (output.shape[-1], given.shape[-1]) == (module.out_features, module.in_features)


def of_transformers(module: torch.nn.Module) -> bool:
    """Return whether transformers wrote the module's class, whose passes may run in bfloat16."""
    return any(c.__module__.partition(".")[0] == "transformers" for c in type(module).__mro__)


def place_of(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Return what tells a tensor from others: its memory and shape; the object itself where it holds no values."""
    own = tensor.numel() and not tensor.is_meta
    return tensor.data_ptr() if own else id(tensor), tuple(tensor.shape)
