"""Measure what an export loses: the challenge's own export, and scores of versions of a model on the same tokens.

`int8_export` is the challenge's baseline in our own words: matrices as int8 with one float16 scale a row, everything
else as it is, `torch.save`, zlib at level 9.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

import data

LEVELS = 127
_CLIP = 0.9999984  # share of a row's magnitudes that is not clipped, as in the challenge
_SMALL = 65_536  # matrices up to so many values stay as they are

State = dict[str, Tensor]
Array = npt.NDArray[np.float64]


def int8_export(state: Mapping[str, Tensor]) -> bytes:
    """A state dict as the challenge's baseline writes it.

    >>> state = {"w": torch.linspace(-1, 1, 2**17).view(256, 512), "gain": torch.ones(8)}
    >>> back = int8_import(int8_export(state))
    >>> bool((back["w"] - state["w"]).abs().max() < 0.005), bool((back["gain"] == 1).all())
    (True, True)
    """
    kept: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for name, tensor in state.items():
        value = tensor.detach().float().cpu()
        if value.ndim != 2 or value.numel() <= _SMALL:
            kept[name] = value
            continue
        peak = value.abs().quantile(_CLIP, dim=1)
        scale = (peak / LEVELS).clamp(min=1 / LEVELS / 2**16).half()
        codes = torch.round(value / scale.float()[:, None]).clamp(-LEVELS, LEVELS)
        kept[name] = codes.to(torch.int8), scale
    raw = io.BytesIO()
    torch.save(kept, raw)
    return zlib.compress(raw.getvalue(), 9)


def int8_import(blob: bytes) -> State:
    """The state dict that an `int8_export` stands for."""
    kept = torch.load(io.BytesIO(zlib.decompress(blob)), weights_only=True)
    return {n: v[0].float() * v[1].float()[:, None] if isinstance(v, tuple) else v for n, v in kept.items()}


@dataclass(frozen=True)
class Losses:
    """Per predicted token of the held-out stream, each (tokens,).

    Attributes:
        nats: negative log-likelihood.
        kl: KL from the original's prediction, nats.
    """

    nats: Array
    kl: Array


@torch.inference_mode()
def losses(
    module: nn.Module, states: Mapping[str, Mapping[str, Any]], tokens: data.Tokens, length: int, batch: int = 16
) -> dict[str, Losses]:
    """Every version of a model on the same windows of `length` that do not overlap, in float32.

    Args:
        module: takes ids (batch, length) and gives logits; any version's values, on the device to use.
        states: state dicts; the first is the original.
        tokens: the held-out stream, every token of it but the first is predicted once.
        length: tokens of context at most.
        batch: windows at once.
    """
    device = next(module.parameters()).device
    stream = torch.from_numpy(tokens.astype(np.int64)).to(device)
    whole = (len(stream) - 1) // length * length
    pairs = [(stream[:whole].view(-1, length), stream[1 : whole + 1].view(-1, length))] if whole else []
    if whole < len(stream) - 1:
        pairs.append((stream[None, whole:-1], stream[None, whole + 1 :]))
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in states}
    twins = {name: {n: torch.as_tensor(v).to(device).float() for n, v in s.items()} for name, s in states.items()}
    for x, y in ((a, b) for pair in pairs for a, b in zip(*(t.split(batch) for t in pair), strict=True)):
        original: Tensor | None = None
        for name, twin in twins.items():
            logp = torch.log_softmax(torch.func.functional_call(module, twin, (x,)).float(), -1).flatten(0, 1)
            original = logp if original is None else original
            kl = (original.exp() * (original - logp)).sum(-1)
            found[name].append((F.nll_loss(logp, y.flatten(), reduction="none"), kl))
    joined = {name: [torch.cat(c).double().cpu().numpy() for c in zip(*parts, strict=True)]
              for name, parts in found.items()}  # fmt: skip
    return {name: Losses(*columns) for name, columns in joined.items()}


def sums(values: npt.NDArray[Any], group: npt.NDArray[np.int64]) -> Array:
    """Sums of (tokens,) values over groups 0, 1, ..."""
    return np.bincount(group, values)


def documents(tokens: data.Tokens, control: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number of the document of every predicted token; every control token starts one."""
    return np.cumsum(control[tokens[1:]])
