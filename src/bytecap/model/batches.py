"""Handle batches that only the user's loss understands, and find the cross entropy inside it.

`loss(module, batch)` gives the mean loss of a batch in nats. Where it ends in `torch.nn.functional.cross_entropy` or
`nll_loss`, as nearly every language model's does, the logits are taken from that call: labels are then drawn from
the model itself (true Fisher instead of the empirical one), and the distance to the original is the KL divergence
instead of the increase of the loss. Any other loss gives the empirical Fisher and its own increase.

>>> from torch.nn import functional as F
>>> batch = Batch((), 0, torch.eye(3), lambda m, x: F.cross_entropy(m(x), torch.tensor([0, 1, 2])), 3)
>>> with Seen() as seen:
...     value = batch.value(nn.Linear(3, 5))
>>> [tuple(logp.shape) for logp, _ in seen.found]
[(3, 5)]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.overrides import TorchFunctionMode

from bytecap.errors import BytecapError, UsageError
from bytecap.model.fisher import fisher_change
from bytecap.model.quantized_copy import Values, swapped
from bytecap.model.texts import Window

Loss = Callable[[nn.Module, Any], Any]
_LOSSES = (F.cross_entropy, F.nll_loss)


@dataclass(frozen=True)
class Batch(Window):
    """A window whose content only its loss understands.

    Attributes:
        data: what the loss takes beside the module.
        loss: mean loss in nats.
        count: predictions the mean is over.
    """

    data: Any
    loss: Loss
    count: int

    @property
    def predicted(self) -> int:
        """Number of predictions."""
        return self.count

    def value(self, module: nn.Module, device: torch.device | str = "cpu") -> Tensor:
        """The loss as a scalar tensor.

        Raises:
            UsageError: it is not one finite number.
        """
        try:
            found = self.loss(module, on(self.data, device))
        except BytecapError:
            raise
        except Exception as exc:
            raise UsageError(f"the loss raised {type(exc).__name__}: {exc}") from exc
        if not isinstance(found, Tensor):
            raise UsageError(f"the loss must return a scalar tensor, not {type(found).__name__}")
        if found.numel() != 1:
            raise UsageError(f"the loss must return one number, not a tensor of shape {tuple(found.shape)}")
        if not bool(torch.isfinite(found)):
            raise UsageError(f"the loss returned {float(found.detach())} on a batch of {self.count} predictions")
        return found.reshape(())

    def fisher_loss(self, module: nn.Module, generator: torch.Generator, device: torch.device) -> Tensor:
        """The summed loss, with gradients of the true Fisher where the model has logits."""
        with _Sampled(generator):
            found = self.value(module, device)
        if not found.requires_grad:
            raise UsageError("the loss has no gradient: it must be computed by the module, in torch, without no_grad")
        return found * self.count


def on(data: Any, device: torch.device | str) -> Any:
    """Return the same structure of lists, tuples and dictionaries with its tensors on a device."""
    if isinstance(data, Tensor):
        return data.to(device)
    if isinstance(data, Mapping):
        return {k: on(v, device) for k, v in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(on(v, device) for v in data))
    return type(data)(on(v, device) for v in data) if isinstance(data, list | tuple) else data


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, int] | None:
    """Return (scores (n, classes), labels (n,), ignored label) of a call with class labels."""
    scores = args[0] if args else kwargs["input"]
    labels = args[1] if len(args) > 1 else kwargs["target"]
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    scores = scores[None] if scores.ndim == 1 else scores.movedim(1, -1)
    return scores.reshape(-1, scores.shape[-1]), labels.reshape(-1), int(kwargs.get("ignore_index", -100))


class Seen(TorchFunctionMode):
    """Keeps (log-probabilities (n, classes), labels (n,)) of every cross entropy inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one call."""
        del types
        kwargs = kwargs or {}
        flat = _flat(args, kwargs) if func in _LOSSES else None
        if flat is not None:
            scores, labels, ignored = flat
            keep = labels != ignored
            self.found.append((torch.log_softmax(scores.detach()[keep].float(), -1), labels[keep]))
        return func(*args, **kwargs)


class _Sampled(TorchFunctionMode):
    """Gives every cross entropy inside gradients of the true Fisher: along random signs, or of labels drawn."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Change one call."""
        del types
        kwargs = dict(kwargs or {})
        flat = _flat(args, kwargs) if func in _LOSSES else None
        if flat is None:
            return func(*args, **kwargs)
        reduction = kwargs.get("reduction", "mean")
        plain = len(args) <= 2 and not any(kwargs.get(k) for k in ("label_smoothing", "size_average", "reduce"))
        if func is F.cross_entropy and plain and kwargs.get("weight") is None and reduction in {"mean", "sum"}:
            return func(*args, **kwargs).detach() + self._signs(*flat, mean=reduction == "mean")
        scores, labels, ignored = flat  # weights of classes, smoothed labels, losses one by one
        logp = torch.log_softmax(scores.detach().float(), -1)
        noise = torch.empty_like(logp).exponential_(generator=self.generator).log_()
        drawn = torch.where(labels == ignored, labels, (logp - noise).argmax(-1))
        if len(args) > 1:
            args = (args[0], drawn.reshape(args[1].shape), *args[2:])
        else:
            kwargs["target"] = drawn.reshape(kwargs["target"].shape)
        return func(*args, **kwargs)

    def _signs(self, scores: Tensor, labels: Tensor, ignored: int, *, mean: bool) -> Tensor:
        """Return 0 with the gradient of a summed or mean loss of scores (n, classes)."""
        keep = labels != ignored
        change = fisher_change(scores, self.generator) * keep[:, None]
        found = (scores * change.to(scores.dtype)).sum() / (max(1, int(keep.sum())) if mean else 1)
        return found - found.detach()


@dataclass(frozen=True)
class Look:
    """A batch as one module sees it: mean loss, and what its cross entropies held (empty without any)."""

    loss: float
    seen: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    @torch.no_grad()
    def at(module: nn.Module, batch: Batch, device: str) -> Look:
        """Run a module."""
        with Seen() as seen:
            loss = float(batch.value(module, device))
        return Look(loss, tuple(seen.found))

    def kl(self, other: Look) -> float:
        """Mean KL from this to another module's predictions in nats; the loss's increase where there are none."""
        if not self.seen or len(self.seen) != len(other.seen):
            return other.loss - self.loss
        total = sum(float((p.exp() * (p - q)).sum()) for (p, _), (q, _) in zip(self.seen, other.seen, strict=True))
        return total / max(1, sum(len(p) for p, _ in self.seen))

    def same(self, other: Look) -> float:
        """Share of equal top-1 predictions; NaN where there are none."""
        if not self.seen or len(self.seen) != len(other.seen):
            return math.nan
        pairs = list(zip(self.seen, other.seen, strict=True))
        equal = sum(int((p.argmax(-1) == q.argmax(-1)).sum()) for (p, _), (q, _) in pairs)
        return equal / max(1, sum(len(p) for (p, _), _ in pairs))

    def tempered(self, temperature: float) -> float:
        """Mean cross entropy at a temperature; NaN where there are no predictions."""
        if not self.seen:
            return math.nan
        total = sum(float(F.cross_entropy(p / temperature, y, reduction="sum")) for p, y in self.seen)
        return total / max(1, sum(len(p) for p, _ in self.seen))


def variants_of(
    original: nn.Module, quantized_copy: nn.Module, variants: Mapping[str, Values], batch: Batch, device: str
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Return the original's loss on a batch, and (distance, loss) of every variant, all means in nats."""
    first, found = Look.at(original, batch, device), {}
    for label, values in variants.items():
        with swapped(quantized_copy, values):
            look = Look.at(quantized_copy, batch, device)
        found[label] = first.kl(look), look.loss
    return first.loss, found


def rows_of_batches(
    original: nn.Module,
    quantized_copy: nn.Module,
    variants: Mapping[str, Values],
    windows: Sequence[Window],
    device: str,
    advance: Callable[[float], None] | None,
) -> dict[str, list[tuple[float, ...]]]:
    """Score variants by the batches' own loss; without predictions its increase stands in for the KL.

    Returns:
        KL, loss, loss of the original, predictions and bytes of every batch, by variant; the first three are sums.
    """
    rows: dict[str, list[tuple[float, ...]]] = {label: [] for label in variants}
    total = sum(w.predicted for w in windows)
    for batch in windows:
        assert isinstance(batch, Batch)  # noqa: S101 (sets hold one kind)
        n = batch.count
        first, found = variants_of(original, quantized_copy, variants, batch, device)
        for label, (kl, loss) in found.items():
            rows[label].append((kl * n, loss * n, first * n, n, batch.bytes))
            if advance is not None:
                advance(n / total)
    return rows


def is_batches(windows: Sequence[Window]) -> bool:
    """Return whether these are batches with a loss of their own."""
    return bool(windows) and isinstance(windows[0], Batch)
