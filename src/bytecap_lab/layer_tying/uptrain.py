"""Move a tied model towards the original by distillation.

Every parameter is trained by AdamW on the KL from the original's predictions to the tied model's, on plain text. Looks
at held-out tokens decide: the best model seen is what is left, the untrained one included.

Source: Relaxed Recursive Transformers (Bae et al., ICLR 2025, arXiv:2410.20672), which trains on labels and on the KL;
`labels` mixes them in. Omitted: their 15 to 60 billion tokens, and depth-wise batching.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.calibration.kl_gradient import gradient
from bytecap.errors import TextError
from bytecap.job.effort import Effort
from bytecap.model.evaluation import by_window
from bytecap.model.forward import fast_dtype, pass_tokens
from bytecap.model.linears import of_transformers
from bytecap.model.oom_retry import halving
from bytecap.model.texts import Window, iteration_windows
from bytecap.progress import Reporter, Silent
from bytecap.recovery.checkpointing import ProgressCheckpoint
from bytecap.recovery.kl_passes import tokens_of_iteration
from bytecap.recovery.loop import Clock
from bytecap.system.cache import Store

RATE = 1e-3  # first learning rate
_BETAS = (0.9, 0.95)
_WARMING = 20  # iterations until the full rate
_LAST = 0.05  # share of the rate that is left at the end
_CHECKS = 8  # validations on the held-out tokens
_CLIP = 1.0  # norm of the gradient
_WORSE = 4.0  # times the smallest loss seen: training diverges
_NOTHING = 1e-2  # nats that a loss may always have
HELD_TOKENS = 4096  # most of the held-out tokens


@dataclass(frozen=True)
class Uptraining:
    """The record of an uptraining.

    Attributes:
        kl_start: KL to the original on the held-out tokens before, nats per token.
        kl: of the best model seen, which is what is left.
        moves: number of iterations made.
        tokens: predicted tokens they read.
        seconds: wall time of the iterations, validations included.
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
    """Held-out figures in nats per token: the training loss, and the KL to the original."""

    loss: float
    kl: float


class Trainer:
    """AdamW over a student's parameters, moved along the gradient of the KL to the original."""

    def __init__(
        self, original: nn.Module, student: nn.Module, *, device: str, rate: float = RATE, labels: float = 0.0
    ) -> None:
        self.original, self.student, self.device, self.rate, self.labels = original, student, device, rate, labels
        self.optimizer = torch.optim.AdamW(list(self.parameters().values()), lr=rate, betas=_BETAS, weight_decay=0.0)
        self.batch = pass_tokens(original, torch.device(device))
        self.number = self.tokens = 0

    def iterate(self, windows: Sequence[Window], share: float = 1.0) -> float:
        """Make one iteration at a share of the rate; returns the mean loss before it.

        A loss that is not a number is returned without an iteration.
        """
        loss, gradients = self._gradients(windows)
        self.number += 1
        self.tokens += sum(w.predicted for w in windows)
        if not math.isfinite(loss):
            return loss
        parameters = self.parameters()
        for name, p in parameters.items():
            p.grad = gradients[name]
        nn.utils.clip_grad_norm_(parameters.values(), _CLIP)
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
                    self.original, self.student, list(self.parameters()), windows, device=self.device, batch=batch,
                    labels=self.labels,
                )  # fmt: skip

        found, self.batch = halving(work, windows, self.batch, "uptraining")
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the student reads now, each once."""
        return {n: p for n, p in self.student.named_parameters() if p.is_floating_point()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return every trained tensor, read by the student now or not, and the progress; `resume` takes it back."""
        found: dict[str, Tensor] = {}
        for i, p in enumerate(self._parameters()):
            found |= {f"parameter {i}": p, **{f"adam {k} {i}": v for k, v in self.optimizer.state[p].items()}}
        return found, {"number": self.number, "tokens": self.tokens, "batch": self.batch}

    @torch.no_grad()
    def resume(self, kept: Mapping[str, Tensor], about: Mapping[str, int]) -> None:
        """Go on from what `state` gave."""
        self.number, self.tokens, self.batch = about["number"], about["tokens"], about["batch"]
        for i, p in enumerate(self._parameters()):
            p.copy_(kept[f"parameter {i}"])
            mine = {k: kept[n] for k in ("step", "exp_avg", "exp_avg_sq") if (n := f"adam {k} {i}") in kept}
            self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in mine.items()}

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def validate(self, windows: Sequence[Window]) -> Look:
        """Measure the training loss and the KL on held-out windows."""
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
    checkpoint: ProgressCheckpoint | None = None,
) -> Uptraining:
    """Move a student towards the original, in place; it ends as the best model seen.

    Args:
        original: untouched model on the device.
        student: tied model on the device.
        train: windows to learn from.
        held: windows of the validations.
        effort: iterations, or seconds of them.
        device: torch device.
        seed: order of the windows.
        rate: first learning rate.
        labels: share of the text's own next tokens in the loss, 0 to 1.
        reporter: told about progress.
        checkpoint: where it is kept from time to time, and goes on from; None keeps nothing.
    """
    reporter, checkpoint = reporter or Silent(), checkpoint or ProgressCheckpoint(Store())
    trainer = Trainer(original, student, device=device, rate=rate, labels=labels)
    diverged = False
    with reporter.step("uptraining", 1) as advance:
        clock = Clock(effort, advance)
        so = _SoFar.of(trainer, clock, held, checkpoint)
        source = islice(iteration_windows(train, tokens_of_iteration(device), seed), trainer.number, None)
        while clock.done < 1 and not diverged:
            loss = trainer.iterate(
                next(source), min(1.0, (trainer.number + 1) / _WARMING) * (1 - (1 - _LAST) * clock.done)
            )
            clock.tick()
            if clock.due(_CHECKS) or not math.isfinite(loss):
                now = trainer.validate(held)
                diverged = not now.loss < _WORSE * max(so.best.loss, _NOTHING)
                if now.loss < so.best.loss:
                    so.best, so.kept = now, _state(student)
            if not diverged:
                checkpoint.put(lambda: so.state(trainer, clock), now=clock.done >= 1)
    if diverged:
        reporter.note(
            f"uptraining diverges after {trainer.number} iterations (held-out KL {now.kl:.4f}): stopped, the best is "
            f"kept (a smaller --rate than {rate:g} may help)"
        )
    _restore(student, so.kept)
    return Uptraining(so.start.kl, so.best.kl, trainer.number, trainer.tokens, clock.seconds, diverged)


@dataclass
class _SoFar:
    """The state of an uptraining besides its trainer and its clock.

    Attributes:
        start, best: the first validation, and the best.
        kept: parameters at the best.
    """

    start: Look
    best: Look
    kept: dict[str, Tensor]

    @staticmethod
    def of(trainer: Trainer, clock: Clock, held: Sequence[Window], checkpoint: ProgressCheckpoint) -> _SoFar:
        """Return the state that the course kept, from which trainer and clock go on, or that of the beginning."""
        found = checkpoint.get()
        if found is None:
            start = trainer.validate(held)
            return _SoFar(start, start, _state(trainer.student))
        tensors, about = found
        trainer.resume(tensors, about["trainer"])
        kept = {n: tensors[f"best {n}"] for n, _ in trainer.student.named_parameters()}
        clock.resume(trainer.number, about["seconds"], tuple(about["looked"]))
        return _SoFar(Look(*about["start"]), Look(*about["best"]), kept)

    def state(self, trainer: Trainer, clock: Clock) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state that `of` goes on from."""
        tensors, numbers = trainer.state()
        return tensors | {f"best {n}": t for n, t in self.kept.items()}, {
            "trainer": numbers, "start": astuple(self.start), "best": astuple(self.best), "looked": clock.validated,
            "seconds": clock.seconds,
        }  # fmt: skip


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
        device: that decides the tokens of an iteration, of which the text must hold one.
        what: the text, for messages.

    Raises:
        TextError: too little is left for one iteration.
    """
    left = list(pool)
    total = sum(w.predicted for w in left)
    held: list[list[Window]] = [[] for _ in range(parts)]
    for part in held:
        while left and sum(w.predicted for w in part) < min(HELD_TOKENS, total // 16):
            part.append(left.pop())
    need = tokens_of_iteration(device)
    if sum(w.predicted for w in left) < need or not all(held):
        raise TextError(
            f"{what}: {total:,} tokens are too few to train on: an iteration takes {need:,}, a sixteenth is held out"
        )
    yield left
    yield from held
