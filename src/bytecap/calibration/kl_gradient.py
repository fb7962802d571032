"""Compute the gradient of the KL to the original at a coded model, weight by weight.

At the original the KL is flat; at a coded model it is not: every unit's slope holds its own error's share, which its
metric predicts, and the share of all other units' errors, which no metric of single units knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bytecap.model.forward import batches, predictions
from bytecap.model.texts import Window


def gradient(
    original: nn.Module,
    quantized_copy: nn.Module,
    names: Sequence[str],
    windows: Sequence[Window],
    *,
    device: str,
    batch: int = 1024,
    labels: float = 0.0,
    fast: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """Mean KL from the original to the copy in nats per token, and its gradient at its tensors.

    Args:
        original: untouched model.
        quantized_copy: coded model.
        names: parameters of the copy.
        windows: plain windows.
        device: torch device.
        batch: tokens of one pass.
        labels: share of the text's own next tokens (cross entropy) in what is returned, the rest is the KL.
        fast: multiply in bfloat16, logits too; weights, their gradients, norms and the KL's sums stay in float32.
        progress: called with the number of tokens finished.
    """
    tensors = dict(quantized_copy.named_parameters(remove_duplicate=False))
    leaves = [tensors[n] for n in names]
    before = [p.requires_grad for p in leaves]
    for p in leaves:
        p.requires_grad_(True)
        p.grad = None
    tokens = sum(w.predicted for w in windows)
    total = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for ids, mask in batches(windows, batch):
            inside, real = ids[:, :-1].to(device), mask.to(device)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast):
                with torch.no_grad():
                    target = predictions(original(inside), real).float().log_softmax(-1)
                found = predictions(quantized_copy(inside), real).float().log_softmax(-1)
            loss = nn.functional.kl_div(found, target, reduction="sum", log_target=True) / tokens
            if labels:
                own = nn.functional.nll_loss(found, ids[:, 1:].to(device)[real], reduction="sum") / tokens
                loss = (1 - labels) * loss + labels * own
            loss.backward()
            total += loss.detach()
            if progress is not None:
                progress(int(mask.sum()))
        found_gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in zip(names, leaves, strict=True)
        }
    finally:
        for p, wanted in zip(leaves, before, strict=True):
            p.grad = None
            p.requires_grad_(wanted)
    return float(total), {n: g.float() for n, g in found_gradients.items()}
