"""Any `nn.Module` as a `Model`: a float32 copy, its units, and what its forward speaks.

The user's module is never touched: everything runs on a copy in evaluation mode. Buffers keep their dtype unless
they are of half precision, and are stored exactly.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bytecap.errors import BytecapError, CheckpointError, UsageError
from bytecap.format.coders.exact import WIDTH
from bytecap.model.batches import Batch, Seen
from bytecap.model.checkpoint import DTYPES, Model, check_finite, find_units, tensors_of, unready
from bytecap.model.hook_coverage import WIDEST
from bytecap.types import Unit

Speech = Literal["logits", "loss"]
_HALVES = {torch.float16, torch.bfloat16}


def model_of(module: nn.Module, name: str | None = None) -> Model:
    """A float32 copy of a module as a `Model`; source dtypes are remembered.

    Raises:
        CheckpointError: it cannot be copied, holds nothing to store, or a tensor of a dtype the format lacks.
    """
    name = name or type(module).__name__
    live = tensors_of(module)
    for n, t in live.items():
        if why := unready(t):
            raise CheckpointError(f"{name}: tensor {n} holds no values, it is {why}")
    dtypes = {n: DTYPES.get(str(t.dtype), str(t.dtype)) for n, t in live.items()}
    for n, t in live.items():
        if dtypes[n] not in WIDTH:
            raise CheckpointError(f"{name}: tensor {n} has the dtype {str(t.dtype).removeprefix('torch.')}, "
                                  "which cannot be stored")  # fmt: skip
    if not any(p.numel() for p in module.parameters()):
        raise CheckpointError(f"the module {name} has no parameters: there is nothing to store")
    try:
        twin = copy.deepcopy(module)
    except Exception as exc:
        raise CheckpointError(f"the module {name} cannot be copied: {exc}") from exc
    twin.eval()
    with torch.no_grad():
        for p in twin.parameters():
            p.requires_grad_(False)
            if p.is_floating_point():
                p.data = p.data.float()
        for b in twin.buffers():
            if b.dtype in _HALVES:
                b.data = b.data.float()
    units = tuple(_oriented(u) for u in find_units(twin, dtypes))
    try:
        check_finite(units, twin)
    except CheckpointError as exc:
        raise CheckpointError(f"{name}: {exc}") from None
    return Model(twin, units, {}, name, notes=_extra_state(module), rounded=_rounded(module, twin, units))


def _extra_state(module: nn.Module) -> tuple[str, ...]:
    """A note about extra state, which is not stored."""
    extra = [n for n in module.state_dict() if n.endswith("_extra_state")]
    return (f"extra state is not stored, the module that loads the file keeps its own: {', '.join(extra)}",) * bool(
        extra
    )


def _rounded(module: nn.Module, twin: nn.Module, units: Sequence[Unit]) -> frozenset[str]:
    """Names of float64 parameters that float32 does not hold."""
    live, copied = tensors_of(module), tensors_of(twin)
    wide = [u.name for u in units if live[u.name].dtype != copied[u.name].dtype == torch.float32]
    return frozenset(n for n in wide if not torch.equal(live[n].detach().double(), copied[n].detach().double()))


def _oriented(unit: Unit) -> Unit:
    """Wide tensors with a few large members lie on their side, where a second moment over columns is small."""
    rows, cols = unit.matrix_shape
    if len(unit.shape) > 2 and cols > WIDEST and 1 < rows <= WIDEST:
        return replace(unit, transposed=True)
    return unit


def speech(module: nn.Module) -> Speech:
    """What a language model's forward gives: `forward(ids) -> logits` or `forward(ids, targets) -> loss`."""
    wanted = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}
    ]
    if len(wanted) > 2:
        raise UsageError(
            f"forward of {type(module).__name__} wants {len(wanted)} arguments; bytecap knows forward(ids) -> logits "
            "and forward(ids, targets) -> loss: give a loss for anything else"
        )
    return "loss" if len(wanted) == 2 else "logits"


def next_token(module: nn.Module, ids: Tensor) -> Any:
    """The loss of `forward(ids, targets) -> loss` on ids (batch, length)."""
    return module(ids[:, :-1], ids[:, 1:])


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next(module.parameters()).device


@torch.no_grad()
def vocabulary(module: nn.Module, kind: Speech) -> int | None:
    """Number of classes a language model predicts; None where its loss hides them.

    Raises:
        UsageError: forward fails, or gives neither logits nor one number.
    """
    ids = torch.zeros(1, 4, dtype=torch.long, device=device_of(module))
    if kind == "loss":
        with Seen() as seen:
            Batch((), 0, ids, next_token, 3).value(module, ids.device)
        return seen.found[0][0].shape[-1] if seen.found else None
    try:
        found = module(ids)
    except BytecapError:
        raise
    except Exception as exc:
        raise UsageError(f"forward of {type(module).__name__} raised {type(exc).__name__}: {exc}") from exc
    found = getattr(found, "logits", found)
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != ids.shape:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(f"forward of {type(module).__name__} must give logits (batch, length, vocabulary), not {what}")
    if not bool(torch.isfinite(found).all()):
        raise UsageError(f"forward of {type(module).__name__} gives logits that are not finite")
    return int(found.shape[-1])
