"""Sample windows of tokens from a model itself, for recovery where no text is at hand.

Sampled at temperature 1, so that the distribution is the model's own. Sources: LLM-QAT (arXiv:2305.17888) for
distilling on a model's own samples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.model.forward import is_far_faster
from bytecap.model.texts import Window

_ROWS = {"cpu": 32, "cuda": 2048}  # windows sampled side by side, at most
_SHARE = 4  # a quarter of a GPU's whole memory is for what they keep, so that a seed means one text on one kind of GPU
_COPIES = 2  # of keys and values: a layer's are copied as they grow


@torch.no_grad()
def sample(
    module: nn.Module, firsts: Sequence[int], tokens: int, *, window: int, seed: int, device: str
) -> tuple[Window, ...]:
    """Sample windows with at least so many predicted tokens together.

    Args:
        module: causal model of transformers, which keeps keys and values of what it has read.
        firsts: tokens that windows may begin with, drawn evenly.
        tokens: how many.
        window: predicted tokens in a window.
        seed: of the sampling.
        device: torch device; rows are halved where its memory ends. On a GPU that multiplies bfloat16 products are in
            it, so that keys and values take half the memory and attention is fused.
    """
    rng = random.Random(seed)  # noqa: S311 (sampling, not cryptography)
    generator = torch.Generator(device).manual_seed(seed)
    rows = _rows(module, firsts[0], window, device)
    found: list[Window] = []
    while len(found) * window < tokens:
        count = min(rows, -(-tokens // window) - len(found))
        start = torch.tensor([[rng.choice(firsts)] for _ in range(count)], device=device)
        try:
            ids = _continued(module, start, window, generator)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise MemoryError("the device's memory does not hold one sampled window") from None
            ids = None
        if ids is None:  # behind the handler, which holds what the pass has computed
            rows //= 2
            torch.cuda.empty_cache()
            continue
        found += [Window(tuple(row), 0) for row in ids.tolist()]
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # keys and values of nothing that comes later: other jobs may need the room
    return tuple(found)


def _rows(module: nn.Module, first: int, window: int, device: str) -> int:
    """Return how many windows go side by side, by what one of them keeps; a power of two."""
    kind = torch.device(device).type
    if kind == "cpu":
        return _ROWS[kind]
    with _autocast(device):
        out: Any = module(torch.tensor([[first]], device=device), use_cache=True)
    layers = getattr(out.past_key_values, "layers", [])
    kept = [t.nbytes for x in layers for t in (getattr(x, "keys", None), getattr(x, "values", None)) if t is not None]
    one = _COPIES * window * sum(kept) + 4 * 4 * out.logits.shape[-1]
    affordable: int = torch.cuda.get_device_properties(device).total_memory // _SHARE // one
    return min(_ROWS[kind], 1 << max(0, affordable.bit_length() - 1))


def _autocast(device: str) -> torch.autocast:
    target = torch.device(device)
    return torch.autocast(target.type, torch.bfloat16, enabled=is_far_faster(target))


def _continued(module: nn.Module, ids: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Continue rows (rows, 1) by `count` tokens."""
    parts, past = [ids], None
    for _ in range(count):
        with _autocast(str(ids.device)):
            out: Any = module(parts[-1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        chances = out.logits[:, -1].float().softmax(-1)
        parts.append(torch.multinomial(chances, 1, generator=generator))
    return torch.cat(parts, 1)
