"""Draw gradients of predictions whose second moment is the true Fisher.

A loss against labels that are sampled from the model's own predictions has the true Fisher as second moment of its
gradients. So has anything else of the same covariance, and random signs have less noise: a sampled label nearly always
says that nothing is wrong with a confident prediction, seldom very much, and tells of one row of the head only, where
signs tell something of every row each time.

>>> change = fisher_change(torch.tensor([[2.0, 0.0, -1.0]]), torch.Generator().manual_seed(0))
>>> tuple(change.shape), bool(change.sum().abs() < 1e-6)  # as with labels, no gradient along equal logits
((1, 3), True)
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def fisher_change(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random gradient (n, classes), float32, of logits (n, classes) for every prediction `p`.

    It is `(diag(sqrt p) - p sqrt(p)^T) e` with random signs `e`: its mean is 0 and its covariance
    `diag(p) - p p^T`, that of the loss's gradient where the label is sampled from `p`.
    """
    p = torch.softmax(logits.float(), -1)
    change = torch.empty_like(p).bernoulli_(0.5, generator=generator).mul_(2).sub_(1).mul_(p.sqrt())
    change -= p.mul_(change.sum(-1, keepdim=True))
    return change
