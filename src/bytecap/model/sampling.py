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

from bytecap.model.texts import Window

_ROWS = {"cpu": 32, "cuda": 2048}  # windows sampled side by side


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
        device: torch device; rows are halved where its memory ends.
    """
    rng = random.Random(seed)  # noqa: S311 (sampling, not cryptography)
    generator = torch.Generator(device).manual_seed(seed)
    rows = _ROWS[torch.device(device).type]
    found: list[Window] = []
    while len(found) * window < tokens:
        count = min(rows, -(-tokens // window) - len(found))
        start = torch.tensor([[rng.choice(firsts)] for _ in range(count)], device=device)
        try:
            ids = _continued(module, start, window, generator)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise MemoryError("the device's memory does not hold one sampled window") from None
            rows //= 2
            torch.cuda.empty_cache()
            continue
        found += [Window(tuple(row), 0) for row in ids.tolist()]
    return tuple(found)


def _continued(module: nn.Module, ids: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Continue rows (rows, 1) by `count` tokens."""
    parts, past = [ids], None
    for _ in range(count):
        out: Any = module(parts[-1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        chances = out.logits[:, -1].float().softmax(-1)
        parts.append(torch.multinomial(chances, 1, generator=generator))
    return torch.cat(parts, 1)
