"""Gradient of the KL to the original at a coded model, weight by weight.

At the original the KL is flat; at a coded model it is not: every unit's slope holds its own error's share, which its
metric predicts, and the share of all other units' errors, which no metric of single units knows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from bytecap.model.probe import batch_tokens, batches, logits_of
from bytecap.model.text import Window


def kl_gradients(
    original: nn.Module,
    coded: nn.Module,
    names: Collection[str],
    windows: Sequence[Window],
    *,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Mean gradient of KL(original || coded), nats per token, float32 in stored layout on the CPU.

    Args:
        original: untouched model, gives logits.
        coded: the same model with other values.
        names: parameters, by a name of each.
        windows: plain windows.
        device: torch device.
        progress: called with the number of tokens finished.
    """
    live = dict(coded.named_parameters(remove_duplicate=False))
    wanted = {n: live[n] for n in names}
    before = {n: p.requires_grad for n, p in wanted.items()}
    vocabulary = max((len(p) for p in wanted.values() if p.ndim == 2), default=4096)
    tokens = 0
    try:
        for p in wanted.values():
            p.requires_grad_(True)
            p.grad = None
        for ids, mask in batches(windows, batch_tokens(vocabulary)):
            inputs, flat = ids[:, :-1].to(device), mask.to(device)
            with torch.no_grad():
                target = torch.softmax(logits_of(original(inputs))[flat].float(), -1)
            found = torch.log_softmax(logits_of(coded(inputs))[flat].float(), -1)
            (-(target * found).sum()).backward()
            tokens += int(mask.sum())
            if progress is not None:
                progress(int(mask.sum()))
        return {
            n: (torch.zeros_like(p) if p.grad is None else p.grad).detach().float().cpu() / max(1, tokens)
            for n, p in wanted.items()
        }
    finally:
        for n, p in wanted.items():
            p.grad = None
            p.requires_grad_(before[n])
