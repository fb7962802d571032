"""Compute the gradient of the KL to the original at a coded model, weight by weight.

At the original the KL is flat; at a coded model it is not: every unit's slope holds its own error's share, which its
metric predicts, and the share of all other units' errors, which no metric of single units knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bytecap.model.forward import batches, logits_of
from bytecap.model.texts import Window

_AT_A_TIME = 2**26  # logits


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
                    target = logits_of(original(inside)).flatten(0, 1)
                found = logits_of(quantized_copy(inside))
            kl, slopes = divergence(found.detach().flatten(0, 1), target, real.flatten(), ids[:, 1:], labels)
            del target
            torch.autograd.backward(found, slopes.div_(tokens).view_as(found))
            total += kl / tokens
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


@torch.no_grad()
def divergence(
    found: Tensor, target: Tensor, real: Tensor | None = None, ids: Tensor | None = None, labels: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the loss of logits, summed over real rows, in float64, and its gradient, in the logits' dtype.

    Some rows at a time, so that nothing of the vocabulary's width in float32 is ever whole.

    Args:
        found: logits of the copy (rows, vocabulary).
        target: those of the original.
        real: (rows,), which of them count; all by default.
        ids: the text's own next tokens (batch, length), as many as rows; needed for a share of them.
        labels: that share, see `gradient`.
    """
    slopes, total = torch.empty_like(found), torch.zeros((), dtype=torch.float64, device=found.device)
    own = ids.flatten().to(found.device) if labels and ids is not None else None
    real = torch.ones(len(found), dtype=torch.bool, device=found.device) if real is None else real
    for at in range(0, len(found), max(1, _AT_A_TIME // found.shape[1])):
        rows = slice(at, at + max(1, _AT_A_TIME // found.shape[1]))
        there, here = (t[rows].float().log_softmax(-1) for t in (target, found))
        wanted, counts = there.exp(), real[rows, None]
        loss = there.sub_(here).mul_(wanted).sum(1, keepdim=True)
        slope = here.exp()
        if own is not None:
            loss = (1 - labels) * loss - labels * here.gather(1, own[rows, None])
            wanted.mul_(1 - labels).scatter_add_(1, own[rows, None], torch.full_like(loss, labels))
        total += loss.masked_fill(~counts, 0).sum(dtype=torch.float64)
        slopes[rows] = slope.sub_(wanted).masked_fill_(~counts, 0)
    return total, slopes
