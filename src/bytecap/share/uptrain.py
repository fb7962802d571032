"""Uptraining: a tied model is moved towards the original by distillation.

Every parameter is trained by AdamW on the KL from the original's predictions to the tied model's, on plain text. Looks
at held-out tokens decide: the best model seen is what is left, the untrained one included.

Source: Relaxed Recursive Transformers (Bae et al., ICLR 2025, arXiv:2410.20672), which trains on labels and on the KL;
`labels` mixes them in. Omitted: their 15 to 60 billion tokens, and depth-wise batching.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bytecap.errors import TextError
from bytecap.model.checkpoint import of_transformers
from bytecap.model.evaluate import by_window
from bytecap.model.gradient import gradient
from bytecap.model.probe import fast_dtype, pass_tokens
from bytecap.model.text import Window, moves
from bytecap.passes import halving, tokens_of_move
from bytecap.progress import Reporter, Silent
from bytecap.recover import Effort

RATE = 1e-3  # first learning rate
_BETAS = (0.9, 0.95)
_WARMING = 20  # moves until the full rate
_LAST = 0.05  # share of the rate that is left at the end
_CHECKS = 8  # looks at the held-out tokens
_CLIP = 1.0  # norm of the gradient
_WORSE = 4.0  # times the smallest loss seen: training diverges
_NOTHING = 1e-2  # nats that a loss may always have
HELD_TOKENS = 4096  # most of the held-out tokens


@dataclass(frozen=True)
class Uptraining:
    """What uptraining did.

    Attributes:
        kl_start: KL to the original on the held-out tokens before, nats per token.
        kl: of the best model seen, which is what is left.
        moves: number of moves made.
        tokens: predicted tokens they looked at.
        seconds: wall time of the moves, looks included.
        diverged: stopped because the held-out KL grew without bounds.
    """

    kl_start: float
    kl: float
    moves: int
    tokens: int
    seconds: float
    diverged: bool


@dataclass(frozen=True)
class Look:
    """Held-out figures in nats per token: the loss that is trained on, and the KL to the original."""

    loss: float
    kl: float


class Trainer:
    """AdamW over a student's parameters, moved along the gradient of the KL to the original."""

    def __init__(
        self, original: nn.Module, student: nn.Module, *, device: str, rate: float = RATE, labels: float = 0.0
    ) -> None:
        self.original, self.student, self.device, self.rate, self.labels = original, student, device, rate, labels
        self.optimizer = torch.optim.AdamW(list(self.live().values()), lr=rate, betas=_BETAS, weight_decay=0.0)
        self.batch = pass_tokens(original, torch.device(device))
        self.number = self.tokens = 0

    def move(self, windows: Sequence[Window], share: float = 1.0) -> float:
        """One move at a share of the rate; the mean loss on the windows before it. A loss that is no number is left."""
        loss, gradients = self._gradients(windows)
        self.number += 1
        self.tokens += sum(w.predicted for w in windows)
        if not math.isfinite(loss):
            return loss
        live = self.live()
        for name, p in live.items():
            p.grad = gradients[name]
        nn.utils.clip_grad_norm_(live.values(), _CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _gradients(self, windows: Sequence[Window]) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients; batches are halved where the device's memory ends."""
        kind = torch.device(self.device).type
        fast = fast_dtype(torch.device(kind)) if of_transformers(self.student) else torch.float32

        def work(batch: int) -> tuple[float, dict[str, Tensor]]:
            with torch.autocast(kind, fast, enabled=fast is not torch.float32):
                return gradient(
                    self.original, self.student, list(self.live()), windows, device=self.device, batch=batch,
                    labels=self.labels,
                )  # fmt: skip

        found, self.batch = halving(work, windows, self.batch, "uptraining")
        return found

    def live(self) -> dict[str, nn.Parameter]:
        """Parameters that the student reads now, each once."""
        return {n: p for n, p in self.student.named_parameters() if p.is_floating_point()}

    def look(self, windows: Sequence[Window]) -> Look:
        """The loss that is trained on, and the KL, on held-out windows."""
        found = by_window(self.original, self.student, {"": {}}, windows, device=self.device)[""]
        kl, nats = (float(x.sum() / found.tokens.sum()) for x in (found.kl, found.nats))
        return Look((1 - self.labels) * kl + self.labels * nats, kl)


def uptrain(
    original: nn.Module,
    student: nn.Module,
    train: Sequence[Window],
    held: Sequence[Window],
    effort: Effort,
    *,
    device: str,
    seed: int = 0,
    rate: float = RATE,
    labels: float = 0.0,
    reporter: Reporter | None = None,
) -> Uptraining:
    """Move a student towards the original, in place; what is left is the best model seen.

    Args:
        original: untouched model on the device.
        student: tied model on the device.
        train: windows to learn from.
        held: windows of the looks.
        effort: moves, or seconds of them.
        device: torch device.
        seed: order of the windows.
        rate: first learning rate.
        labels: share of the text's own next tokens in the loss, 0 to 1.
        reporter: told about progress.
    """
    reporter = reporter or Silent()
    trainer = Trainer(original, student, device=device, rate=rate, labels=labels)
    start = best = trainer.look(held)
    kept = _state(student)
    began, last, done, diverged = time.monotonic(), 0.0, 0.0, False
    source = moves(train, tokens_of_move(device), seed)
    with reporter.step("uptraining", 1) as advance:
        while done < 1 and not diverged:
            loss = trainer.move(next(source), min(1.0, (trainer.number + 1) / _WARMING) * (1 - (1 - _LAST) * done))
            done, before = min(1.0, effort.share(trainer.number, time.monotonic() - began)), done
            advance(done - before)
            if done >= 1 or done - last >= 1 / _CHECKS or not math.isfinite(loss):
                last, now = done, trainer.look(held)
                diverged = not now.loss < _WORSE * max(best.loss, _NOTHING)
                if now.loss < best.loss:
                    best, kept = now, _state(student)
    if diverged:
        reporter.note(
            f"uptraining diverges after {trainer.number} moves (held-out KL {now.kl:.4f}): stopped, the best is kept "
            f"(a smaller --rate than {rate:g} may help)"
        )
    _restore(student, kept)
    return Uptraining(start.kl, best.kl, trainer.number, trainer.tokens, time.monotonic() - began, diverged)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


@torch.no_grad()
def _restore(module: nn.Module, state: dict[str, Tensor]) -> None:
    for n, p in module.named_parameters():
        p.copy_(state[n])


def split(pool: Sequence[Window], parts: int, device: str, what: str) -> Iterator[list[Window]]:
    """Training windows, then `parts` sets held out: each a sixteenth of the text, at most `HELD_TOKENS`.

    Args:
        pool: windows in a random order.
        parts: number of sets.
        device: whose moves the text has to hold one of.
        what: the text, for messages.

    Raises:
        TextError: too little is left for one move.
    """
    left = list(pool)
    total = sum(w.predicted for w in left)
    held: list[list[Window]] = [[] for _ in range(parts)]
    for part in held:
        while left and sum(w.predicted for w in part) < min(HELD_TOKENS, total // 16):
            part.append(left.pop())
    need = tokens_of_move(device)
    if sum(w.predicted for w in left) < need or not all(held):
        raise TextError(
            f"{what}: {total:,} tokens are too few to train on: one move takes {need:,}, and a sixteenth is held out"
        )
    yield left
    yield from held
